"""Data read and tokenised while training runs, for what is too large to prepare.

A source is cut into a fixed number of streams (`split_dataset_by_node`), each of whole files where their number allows.
A stream is read in blocks of documents; a block's documents are tokenised and packed as prepared ones are, and its rows
shuffled. The place in a stream is the state of `datasets.IterableDataset` at the block's beginning and a row's number,
so a resumed run reads one block again and continues with the very next row.

Place i of a global batch of B rows belongs to stream i * V // B of the source whose turn it is: the order does not
depend on the number of ranks, and a rank reads only the streams of its places. The cost: V is the largest divisor of
the number of files up to `MAX_STREAMS`. Ranks that share a stream each read and tokenise all of it, so with one file,
or a number of files that divides badly, every rank reads everything.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cook.base.errors import UserError
from cook.data.cache import fingerprint_of
from cook.data.corpus import Corpus, open_corpus, text_of, unit_hash
from cook.data.order import EpochOrder
from cook.data.packing import PackedRows, pack_in_memory
from cook.data.prepare import FORMAT, UNKNOWN, check_ids, open_evaluation, unread
from cook.data.reports import LeftOut
from cook.data.source_files import Document, SourceFile, hash_of_ends
from cook.text.tokenizer import Tokenizer

BLOCK_CHARS = 1 << 22
"""Characters in one block of each of a source's streams together: rows are shuffled inside a block only."""

HEAD_CHARS = 1 << 24
"""Characters at the beginning of a source from which a tokenizer is trained and held-out documents are taken."""

MAX_STREAMS = 64


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A source that is streamed. A document is held out if the hash of its text says so."""

    name: str
    open: Callable[[Sequence[int] | None], Any]
    """The `datasets.IterableDataset` of `{"name", "text"}`, its files in the order of a seed; None: as listed."""
    corpus: Corpus  # the files; for a Hub dataset none
    evaluation: Corpus | None  # a held-out corpus of its own; then no document of the stream is held out
    held_out: float  # share of the documents that is held out
    fingerprint: str  # of the settings and the files' names, sizes and ends: the content is not read for it
    size: int = 0  # bytes to read for the held-out documents: not known

    @property
    def left_out(self) -> LeftOut:
        """Files that are not read."""
        return unread(self.corpus, self.evaluation)

    def is_held_out(self, text: str) -> bool:
        """Whether a document of the stream is never trained on."""
        return self.evaluation is None and unit_hash(text) < self.held_out

    def head(self) -> Iterator[Document]:
        """The first documents, `HEAD_CHARS` characters of them."""
        chars = 0
        for item in self.open(None):
            yield Document(item["name"], item["text"])
            chars += len(item["text"])
            if chars >= HEAD_CHARS:
                return

    def documents(self) -> Iterator[tuple[Document, bool]]:
        """The held-out documents, at least one: its evaluation corpus, or those among its first ones."""
        found = False
        for document in self.evaluation.documents() if self.evaluation else self.head():
            if self.evaluation or self.is_held_out(document.text):
                found = True
                yield document, True
        if not found:
            raise UserError(
                f"the source {self.name}: none of its first {HEAD_CHARS >> 20} million characters is held out",
                remedy="raise data.held_out, or name held_out_paths",
            )

    def training_texts(self) -> Iterator[str]:
        """Texts of the first documents that are not held out."""
        return (document.text for document in self.head() if not self.is_held_out(document.text))


def open_stream(data: Any) -> Stream:
    """Lists the streamed source of a data section; a `UserError` if it cannot be opened."""
    opened: Callable[[Sequence[int] | None], Any]
    if data.type == "hub":
        from cook.data.table_documents import load_hub

        whole = load_hub(data.name, data.subset, data.split, streaming=True)
        corpus = Corpus("hub", (), lambda file: iter(()))
        # Only the library knows the files: they are read in its order in every epoch.
        opened = partial(_open_hub, whole, data.name, data.text_field)
    else:
        corpus = open_corpus(data.type, data.paths, text_field=data.text_field, split=data.split, digest=hash_of_ends)
        opened = partial(_open_files, corpus)
    evaluation = open_evaluation(data) if data.held_out_paths else None
    settings = [data.type, data.name if data.type == "hub" else None, data.subset, data.split, data.text_field]
    parts = [corpus.fingerprint(), evaluation.fingerprint() if evaluation else data.held_out]
    return Stream(
        name=str(data.name),
        open=opened,
        corpus=corpus,
        evaluation=evaluation,
        held_out=data.held_out,
        fingerprint=fingerprint_of("stream", FORMAT, settings, parts),
    )


def _open_files(corpus: Corpus, seed: Sequence[int] | None) -> Any:
    from datasets import IterableDataset

    order = np.arange(len(corpus.files))
    if seed is not None:
        order = EpochOrder(len(order), seed[:-1]).rows(order, seed[-1])
    files = [corpus.files[number] for number in order.tolist()]
    # The files are the library's shards, because they are given as a list.
    return IterableDataset.from_generator(_documents_of, gen_kwargs={"files": files, "read": corpus.read})


def _documents_of(files: Sequence[SourceFile], read: Callable[[SourceFile], Iterator[Document]]) -> Iterator[dict]:
    for file in files:
        for document in read(file):
            yield {"name": document.name, "text": document.text}


def _open_hub(whole: Any, name: str, text_field: str, seed: Sequence[int] | None) -> Any:
    def text(values: dict[str, Any], row: int) -> dict[str, str]:
        where = f"{name}, row {row}"
        return {"name": where, "text": text_of(values, text_field, where)}

    return whole.map(text, with_indices=True, remove_columns=whole.column_names)


@dataclass(frozen=True, kw_only=True)
class StreamedData:
    """Streamed sources, how often each is read, and how their documents become rows."""

    sources: tuple[Stream, ...]  # at least one
    weights: tuple[float, ...]  # in proportion to which the sources are read
    tokenizer: Tokenizer
    max_length: int  # positions of a row, prompt included
    prompt_length: int

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that the rows depend on."""
        tokenizer = self.tokenizer
        sizes = [self.max_length, self.prompt_length, tokenizer.fingerprint, BLOCK_CHARS]
        sizes += ["samples begin with the text"] if tokenizer.start_id is None else []
        return fingerprint_of([stream.fingerprint for stream in self.sources], self.weights, sizes)

    def rows(self, texts: Sequence[str], origin: str, left_out: LeftOut) -> PackedRows | None:
        """Documents as rows, adding up what is left out; None if all are empty."""
        tokenizer = self.tokenizer
        encoded = tokenizer.encode_batch(texts)
        tokens = np.concatenate(encoded) if encoded else np.zeros(0, np.int32)
        check_ids(tokens, tokenizer.vocab_size, origin)
        if tokenizer.unk_id is not None:
            left_out.add(UNKNOWN, int((tokens == tokenizer.unk_id).sum()))
        return pack_in_memory(
            tokens,
            np.cumsum([0, *map(len, encoded)]),
            max_length=self.max_length,
            prompt_length=self.prompt_length,
            start_id=tokenizer.start_id,
            eos_id=tokenizer.eos_id,
            left_out=left_out,
        )


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows made of consecutive documents of a stream, in the order in which they are read."""

    rows: PackedRows
    order: np.ndarray
    epoch: int
    number: int  # of the block in its epoch
    begin: dict[str, Any] | None  # the library's state before the block; None: at the beginning of the epoch
    left_out: dict[str, Any]  # what was left out since the epoch began, up to the block's end
    left_out_before: dict[str, Any]  # the same, up to its beginning


class StreamReader:
    """The rows of one stream in order: stream `part` of the `parts` of a source. `pool` reads a block ahead."""

    def __init__(self, data: StreamedData, source: int, part: int, parts: int, seed: int, pool: Executor):
        self._data, self._stream, self._part, self._parts = data, data.sources[source], part, parts
        self._seed, self._pool = (seed, source), pool
        self._blocks = self._read(0, 0, None, {})
        self._block: Block | None = None
        self._next: Future[Block] | None = None
        self._place = 0

    def take(self, count: int) -> list[tuple[Block, int, str]]:
        """The next rows: block, number in it, and name of each; a `UserError` if a document is malformed."""
        taken = []
        for _ in range(count):
            while self._block is None or self._place == len(self._block.order):
                self._block = (self._next or self._pool.submit(next, self._blocks)).result()
                self._next, self._place = self._pool.submit(next, self._blocks), 0
            block, row = self._block, int(self._block.order[self._place])
            name = f"{self._stream.name}.{self._part}:{block.epoch}.{block.number}.{row}"
            taken.append((block, row, name))
            self._place += 1
        return taken

    def state(self) -> dict[str, Any]:
        """Where the next row is, as JSON."""
        state: dict[str, Any] = {"parts": self._parts}
        if block := self._block:
            state |= {"epoch": block.epoch, "block": block.number, "begin": block.begin, "place": self._place}
            state["left_out"] = block.left_out_before
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Resumes at a state: its block is read again."""
        if "epoch" in state:
            self._blocks = self._read(state["epoch"], state["block"], state["begin"], state["left_out"])
            self._block = self._pool.submit(next, self._blocks).result()
            self._next, self._place = self._pool.submit(next, self._blocks), state["place"]

    @property
    def left_out(self) -> dict[str, Any]:
        """What the blocks that were read in this epoch leave out, as a record."""
        return self._block.left_out if self._block else {}

    @property
    def epoch(self) -> int:
        """The epoch that is being read."""
        return self._block.epoch if self._block else 0

    def _read(self, epoch: int, number: int, begin: dict[str, Any] | None, passed: dict[str, Any]) -> Iterator[Block]:
        from datasets.distributed import split_dataset_by_node

        while True:
            dataset = self._stream.open((*self._seed, epoch))
            if self._parts > 1:
                dataset = split_dataset_by_node(dataset, rank=self._part, world_size=self._parts)
            if begin is not None:
                dataset.load_state_dict(begin)
            found = number > 0
            documents = iter(dataset)
            while texts := self._texts(documents):
                kept = [text for text in texts if not self._stream.is_held_out(text)]
                left_out, before = LeftOut(passed), passed
                rows = self._data.rows(kept, f"the source {self._stream.name}", left_out)
                passed = left_out.record()
                if rows is not None:
                    found = True
                    order = EpochOrder(len(rows), (*self._seed, self._part, epoch)).rows(np.arange(len(rows)), number)
                    place: dict[str, Any] = {"epoch": epoch, "number": number, "begin": begin}
                    yield Block(rows=rows, order=order, **place, left_out=passed, left_out_before=before)
                number, begin = number + 1, copy.deepcopy(dataset.state_dict())
            if not found:
                raise UserError(
                    f"the source {self._stream.name} has no text to train on", remedy="add text to it, or remove it"
                )
            epoch, number, begin, passed = epoch + 1, 0, None, {}

    def _texts(self, documents: Iterator[dict[str, str]]) -> list[str]:
        texts, chars = [], 0
        for document in documents:
            texts.append(document["text"])
            chars += len(document["text"])
            if chars >= BLOCK_CHARS // self._parts:
                break
        return texts


def num_streams(source: Stream) -> int:
    """V: the largest number of streams that share the files evenly, up to `MAX_STREAMS`."""
    shards = source.open(None).num_shards
    return next(parts for parts in range(min(shards, MAX_STREAMS), 0, -1) if shards % parts == 0)
