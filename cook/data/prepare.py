"""From a corpus to rows on the disk, in three cached steps: the tokenizer, the tokens, the rows.

The name of each step's folder contains a fingerprint of all that it depends on, so a changed file, tokenizer or length
makes a new folder and an unchanged one is used again. One process prepares; the others wait for it and read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cook.base.errors import UserError
from cook.data.cache import cached_folder, fingerprint_of, mapped, whole_manifest
from cook.data.corpus import Corpus, grouped, open_corpus, split
from cook.data.packing import pack_to_folder, text_capacity
from cook.data.reports import LeftOut, Progress
from cook.data.source_files import Document
from cook.text.sentencepiece import train_sentencepiece
from cook.text.tokenizer import Tokenizer, load_tokenizer

FORMAT = 2
"""Raised whenever the same inputs would give other files."""

UNKNOWN = "pieces of text that the tokenizer does not know (each is replaced by an unknown token)"
NOT_SAMPLED = "characters beyond the sample of text that a tokenizer is trained on"
TOKENIZER_SEED = 0
MODEL = "sentencepiece.model"
PARTS = ("train", "held_out")


@dataclass(frozen=True)
class SplitCorpus:
    """A corpus and which of its documents are held out: some of its own, its end, or all of a second corpus."""

    corpus: Corpus
    is_held_out: np.ndarray  # bool (num_documents,), over the documents of `corpus`; unused if `end` is given
    evaluation: Corpus | None
    fingerprint: str
    end: int | None = None  # of a corpus that is one text: the last character at which its held-out end may begin
    total: int = 0  # characters of that text

    @property
    def notes(self) -> list[str]:
        """How a corpus that is one text is split; nothing for other corpora."""
        if self.end is None:
            return []
        return [f"a single text: at least the last {self.total - self.end:,} of {self.total:,} characters are held out"]

    @property
    def left_out(self) -> LeftOut:
        """Files that are not read."""
        return unread(self.corpus, self.evaluation)

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return self.corpus.size + (self.evaluation.size if self.evaluation else 0)

    def documents(self) -> Iterator[tuple[Document, bool]]:
        """Every document, and whether it is held out."""
        if self.end is not None:
            yield from _end_held_out(self.corpus.documents(), self.end)
            return
        yield from zip(self.corpus.documents(), self.is_held_out.tolist(), strict=True)
        if self.evaluation is not None:
            yield from ((document, True) for document in self.evaluation.documents())

    def training_texts(self) -> Iterator[str]:
        """Texts of the documents that are not held out."""
        return (document.text for document, held_out in self.documents() if not held_out)


def unread(*corpora: Corpus | None) -> LeftOut:
    """The files of some corpora that are not read."""
    found = LeftOut()
    for corpus in corpora:
        found.include(corpus.left_out.record() if corpus else {})
    return found


def open_split(data: Any) -> SplitCorpus:
    """Opens the corpus of a data section (of a single source) and splits it.

    Raises:
        UserError: The corpus is missing, empty, malformed or too small to split.
    """
    corpus = open_corpus(
        data.type, data.paths, text_field=data.text_field, name=data.name, subset=data.subset, split=data.split
    )
    if data.held_out_paths:
        evaluation = open_evaluation(data)
        num_documents = sum(1 for _ in corpus.documents())
        key = fingerprint_of(FORMAT, corpus.fingerprint(), evaluation.fingerprint())
        return SplitCorpus(corpus, np.zeros(num_documents, bool), evaluation, key)
    names, total = [], 0
    for document in corpus.documents():
        names.append(document.name)
        total += len(document.text)
    is_held_out = split(names, data.held_out)
    parts = [FORMAT, corpus.fingerprint(), data.held_out]
    # A large text file is read as several documents. Alone, it is one text all the same.
    if len(names) > 1 and not (corpus.kind == "text" and sum(file.size > 0 for file in corpus.files) == 1):
        return SplitCorpus(corpus, is_held_out, None, fingerprint_of(*parts))
    end = max(1, min(total - 1, int(total * (1.0 - data.held_out))))
    return SplitCorpus(corpus, is_held_out, None, fingerprint_of(*parts, "end"), end, total)


def _end_held_out(documents: Iterable[Document], end: int) -> Iterator[tuple[Document, bool]]:
    """Consecutive documents of one text, of which all after about character `end` is held out."""
    begin = 0
    for document in documents:
        name, text = document.name, document.text
        if begin < end < begin + len(text):
            cut = break_before(text, end - begin)
            yield Document(name, text[:cut]), False
            yield Document(f"{name}, end", text[cut:]), True
        else:
            yield document, begin >= end
        begin += len(text)


def break_before(text: str, place: int) -> int:
    """`place`, from 1 to the last character, moved back to where a paragraph, a line or else a word begins.

    That is at most a tenth of the text before it. Without one the text is cut between two characters.
    """
    earliest = max(0, place - max(1, len(text) // 10))
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, earliest, place)
        if found > 0:
            return found + len(mark)
    return place


def open_evaluation(data: Any) -> Corpus:
    """The corpus at `held_out_paths`."""
    # Beside the one fixed standard library, or a dataset of the Hub, files can only be plain text.
    kind = data.type if data.type not in ("python_stdlib", "hub") else "text"
    return open_corpus(kind, data.held_out_paths, text_field=data.text_field, split=data.split)


def prepare_tokenizer(tokenizer_config: Any, texts: Iterable[str], fingerprint: str, cache: Path) -> Path:
    """The tokenizer's file or folder: the one that the configuration names, or one trained on `texts`.

    Raises:
        UserError: None is named and the type cannot be trained, or the corpus does not give `vocab_size` pieces.
    """
    if tokenizer_config.path is not None:
        return Path(tokenizer_config.path)
    if tokenizer_config.type != "sentencepiece":
        remedy = "or set tokenizer.type: sentencepiece"
        raise UserError("tokenizer.path is missing", wanted="its file or folder", remedy=remedy)

    def build(folder: Path) -> dict[str, Any]:
        left_out, size = LeftOut(), tokenizer_config.vocab_size
        unseen = train_sentencepiece(texts, folder / MODEL, vocab_size=size, seed=TOKENIZER_SEED)
        left_out.add(NOT_SAMPLED, unseen)
        return {"vocab_size": size, "left_out": left_out.record()}

    key = fingerprint_of("tokenizer", fingerprint, tokenizer_config.vocab_size, TOKENIZER_SEED)
    return cached_folder(cache, "tokenizer", key, build) / MODEL


def open_tokenizer(tokenizer_config: Any, path: Path) -> Tokenizer:
    """Loads the prepared tokenizer; a `UserError` if it cannot be read, or has more ids than `vocab_size`."""
    tokenizer = load_tokenizer(tokenizer_config.type, str(path))
    if tokenizer.vocab_size > tokenizer_config.vocab_size:
        raise UserError(
            f"the tokenizer {path} has more ids than tokenizer.vocab_size",
            wanted=f"at most {tokenizer_config.vocab_size}",
            got=tokenizer.vocab_size,
            remedy="raise tokenizer.vocab_size (and the model's), or name a smaller tokenizer",
        )
    return tokenizer


class Documents(Protocol):
    """What is tokenised: a prepared corpus, or the held-out documents of a stream."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def size(self) -> int: ...
    def documents(self) -> Iterator[tuple[Document, bool]]: ...


def prepare_tokens(corpus: Documents, tokenizer: Tokenizer, cache: Path) -> Path:
    """Tokenises the corpus once: per part, `<part>.tokens.bin` (flat ids) and `<part>.offsets.npy` (their borders)."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)

    def build(folder: Path) -> dict[str, Any]:
        lengths: dict[str, list[int]] = {part: [] for part in PARTS}
        left_out = LeftOut()
        with ExitStack() as stack:
            files = {part: stack.enter_context(open(folder / f"{part}.tokens.bin", "wb")) for part in PARTS}
            progress = stack.enter_context(Progress("tokenising", corpus.size))
            for group in grouped(corpus.documents(), lambda item: len(item[0].text)):
                encoded = tokenizer.encode_batch([document.text for document, _ in group])
                for (document, held_out), ids in zip(group, encoded, strict=True):
                    check_ids(ids, tokenizer.vocab_size, f"document {document.name}")
                    if tokenizer.unk_id is not None:
                        left_out.add(UNKNOWN, int((ids == tokenizer.unk_id).sum()))
                    part = PARTS[held_out]
                    files[part].write(ids.astype(dtype).tobytes())
                    lengths[part].append(len(ids))
                progress.advance(sum(len(document.text) for document, _ in group))
        for part in PARTS:
            np.save(folder / f"{part}.offsets.npy", np.concatenate([[0], np.cumsum(lengths[part], dtype=np.int64)]))
        counts = {part: {"documents": len(lengths[part]), "tokens": sum(lengths[part])} for part in PARTS}
        return {"dtype": dtype.name, "left_out": left_out.record(), **counts}

    return cached_folder(cache, "tokens", fingerprint_of("tokens", corpus.fingerprint, tokenizer.fingerprint), build)


def prepare_rows(
    tokens: Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    prompt_length: int,
    cache: Path,
    parts: Sequence[str] = PARTS,
) -> Path:
    """Cuts and packs the tokens of the parts into rows of `max_length`, prompt included.

    Raises:
        UserError: The length leaves no room for text, or a part has no row.
    """
    text_capacity(max_length, prompt_length)
    manifest = whole_manifest(tokens)

    def build(folder: Path) -> dict[str, Any]:
        statistics = {}
        for part in parts:
            statistics[part] = pack_to_folder(
                mapped(tokens / f"{part}.tokens.bin", manifest["dtype"]),
                np.load(tokens / f"{part}.offsets.npy"),
                row_size=max_length - prompt_length,
                start_id=tokenizer.start_id,
                eos_id=tokenizer.eos_id,
                folder=folder,
                part=part,
            )
            if not statistics[part]["rows"]:
                raise UserError(
                    f"the {part.replace('_', '-')} part of the corpus has no text",
                    got=f"{manifest[part]['documents']} documents, all of them empty",
                    remedy="give more text, or change data.held_out",
                )
        return {"max_length": max_length, "prompt_length": prompt_length, **statistics}

    ends = (tokenizer.start_id, tokenizer.eos_id)
    key = fingerprint_of("rows", manifest["fingerprint"], max_length, prompt_length, *ends)
    return cached_folder(cache, "rows", key, build)


def check_ids(ids: np.ndarray, vocab_size: int, name: str) -> None:
    """A `UserError` that begins with `name` for ids outside the vocabulary, for which no embedding has a row."""
    if len(ids) and not (0 <= ids.min() and ids.max() < vocab_size):
        raise UserError(
            f"{name}: the tokenizer gave an id outside its vocabulary",
            wanted=f"0 to {vocab_size - 1}",
            got=f"{ids.min()} to {ids.max()}",
        )
