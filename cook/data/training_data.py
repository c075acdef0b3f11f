"""The training data of a run: prepared by one process, then mapped by all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cook.base.errors import UserError
from cook.base.files import read_json, write_json
from cook.config.check_inputs import TASK_TYPES, source_names
from cook.config.corpus import DataConfig
from cook.data.cache import fingerprint_of, whole_manifest
from cook.data.cpm_tasks.task_data import TaskData, open_task_rows
from cook.data.packing import open_rows
from cook.data.prepare import (
    PARTS,
    SplitCorpus,
    open_split,
    open_tokenizer,
    prepare_rows,
    prepare_tokenizer,
    prepare_tokens,
)
from cook.data.reports import LeftOut
from cook.data.rows import JoinedRows, Rows
from cook.data.streams import Stream, StreamedData, open_stream
from cook.text.tokenizer import Tokenizer

POINTER = "data.json"
"""File in the output folder that contains the location of the prepared data."""


class TrainingData(NamedTuple):
    """What a trainer reads."""

    tokenizer: Tokenizer
    train: Rows | StreamedData
    held_out: Rows
    notes: tuple[str, ...] = ()  # sentences on what the rows hold and on what was left out of them


def load_rows(
    data: DataConfig,
    tokenizer_config: Any,
    *,
    prompt_length: int,
    output_dir: str | Path,
    seed: int = 0,
    limits: Mapping[str, int | None] | None = None,
    build: bool = True,
) -> TrainingData:
    """Opens the tokenizer and the packed rows of a run.

    On several ranks: rank 0 calls it first, the others wait at a barrier and call it with `build=False`. They follow
    the pointer that rank 0 has left in the output folder, and neither list nor hash the corpus. The output folder and
    the cache must be visible to all ranks.

    Args:
        data: The configuration's data section.
        tokenizer_config: Its tokenizer section (`type, path, vocab_size`).
        prompt_length: Prompt positions in front of every row.
        output_dir: The run's output folder; also holds the cache if `data.cache_dir` is None.
        seed: Of tasks that hide a random part of a sample.
        limits: The model's `prompt_types` and `segment_types`, where known.
        build: Prepare what is missing or out of date. Otherwise only read.

    Raises:
        UserError: The corpus or tokenizer is unusable, or (`build=False`) not prepared for this configuration.
    """
    output = Path(output_dir)
    cache = Path(data.cache_dir) if data.cache_dir is not None else output / "data"
    opening = _Opening(data, tokenizer_config, prompt_length, seed, limits or {}, cache)
    if build:
        opening.prepare(output / POINTER)
    pointer = read_json(output / POINTER)
    if pointer.get("request") != opening.request():
        raise UserError(
            f"{output / POINTER}: the data was prepared for another configuration",
            remedy="prepare it again on one rank, with this configuration",
        )
    return opening.open(pointer)


def read_files(output_dir: str | Path) -> dict[str, list[Any]]:
    """Size and hash of every file of the corpus, as they were when the data was prepared."""
    return read_json(Path(output_dir) / POINTER)["files"]


def changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The changes of the files of a corpus, one phrase each."""
    changes = [f"{name}: missing" for name in before.keys() - now.keys()]
    changes += [f"{name}: new" for name in now.keys() - before.keys()]
    for name in before.keys() & now.keys():
        (size, digest), (new_size, new_digest) = before[name], now[name]
        if digest != new_digest:
            grown = f"{size} bytes then, {new_size} now" if size != new_size else "other content of the same size"
            changes.append(f"{name}: {grown}")
    return sorted(changes)


def one_source_each(data: DataConfig) -> list[DataConfig]:
    """The data section as seen by each source alone: `data` itself where no list of sources is given."""
    if not data.sources:
        return [data]
    own = ("type", "paths", "subset", "split", "text_field", "streaming", "held_out_paths")
    return [
        dataclasses.replace(
            data, sources=(), mixing=None, name=source.name or name, **{key: getattr(source, key) for key in own}
        )
        for name, source in zip(source_names(data), data.sources, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class _Opening:
    """Prepares and reads one source or many, prepared or streamed, text or tasks."""

    data: DataConfig
    tokenizer: Any
    prompt_length: int
    seed: int
    limits: Mapping[str, int | None]
    cache: Path

    @property
    def views(self) -> list[DataConfig]:
        return one_source_each(self.data)

    def request(self) -> str:
        """Hash of the settings on which the prepared data depends."""
        wanted = dataclasses.asdict(self.data)
        for key in ("mixing", "workers", "ledger", "cache_dir"):  # they change no row
            wanted.pop(key)
        tokenizer = [self.tokenizer.type, self.tokenizer.path, self.tokenizer.vocab_size]
        return fingerprint_of(wanted, tokenizer, self.prompt_length)

    def prepare(self, pointer: Path) -> None:
        """Builds what is missing, on one rank, and writes its places to the file `pointer`."""
        # Tasks have no corpus of documents to prepare.
        texts = {
            n: open_split(view)
            for n, view in enumerate(self.views)
            if not view.streaming and view.type not in TASK_TYPES
        }
        streams = {n: open_stream(view) for n, view in enumerate(self.views) if view.streaming}
        path = self._prepare_tokenizer(texts, streams)
        tokenizer = open_tokenizer(self.tokenizer, path)
        places: list[str | None] = []
        trained = whole_manifest(path.parent)["left_out"] if self.tokenizer.path is None else None
        notes = LeftOut(trained).sentences("tokenizer")
        files = {
            self._label(view, file.name): [file.size, file.sha256]
            for number, view in enumerate(self.views)
            if (found := texts.get(number) or streams.get(number))
            for file in found.corpus.files
        }
        for number, view in enumerate(self.views):
            place = None
            where = f"the source {view.name}" if self.data.sources else "data"
            if found := texts.get(number) or streams.get(number):
                tokens = prepare_tokens(found, tokenizer, self.cache)
                parts = PARTS if number in texts else ("held_out",)
                sizes = {"max_length": self.data.max_length, "prompt_length": self.prompt_length}
                place = prepare_rows(tokens, tokenizer, **sizes, cache=self.cache, parts=parts)
                notes += found.left_out.sentences(where)
                notes += [f"{where}: {note}" for note in texts[number].notes] if number in texts else []
                notes += _notes(tokens, place, parts, where)
            else:
                tasks = self._open_tasks(view, tokenizer, build=True)
                files |= {self._label(view, name): list(seen) for name, seen in tasks.files.items()}
                notes += tasks.left_out.sentences(where)
            places.append(str(place.resolve()) if place else None)
        told = {"request": self.request(), "tokenizer": str(path.resolve()), "rows": places, "files": files}
        write_json(pointer, told | {"notes": notes})

    def open(self, pointer: Mapping[str, Any]) -> TrainingData:
        """Reads what `prepare` has built."""
        tokenizer = open_tokenizer(self.tokenizer, Path(pointer["tokenizer"]))
        train: list[Any] = []
        held_out: list[Rows] = []
        for view, place in zip(self.views, pointer["rows"], strict=True):
            if place is None:
                tasks = self._open_tasks(view, tokenizer, build=False)
                train.append(tasks.train)
                held_out.append(tasks.held_out)
                continue
            train.append(open_stream(view) if view.streaming else open_rows(Path(place), "train", self.prompt_length))
            held_out.append(open_rows(Path(place), "held_out", self.prompt_length))
        names = [str(view.name) for view in self.views]
        given = [source.weight for source in self.data.sources if source.weight is not None]
        rows: Rows | StreamedData
        if isinstance(train[0], Stream):
            rows = StreamedData(
                sources=tuple(train),
                weights=tuple(given) or (1.0,),
                tokenizer=tokenizer,
                max_length=self.data.max_length,
                prompt_length=self.prompt_length,
            )
        else:
            rows = _joined(names, train, given or None)
        return TrainingData(tokenizer, rows, _joined(names, held_out), tuple(pointer["notes"]))

    def _prepare_tokenizer(self, texts: dict[int, SplitCorpus], streams: dict[int, Stream]) -> Path:
        known: dict[int, SplitCorpus | Stream] = {**texts, **streams}
        sources = [known[number] for number in sorted(known)]
        prints = [source.fingerprint for source in sources]
        training = (text for source in sources for text in source.training_texts())
        key = prints[0] if len(prints) == 1 else fingerprint_of(prints)
        return prepare_tokenizer(self.tokenizer, training, key, self.cache)

    def _label(self, view: DataConfig, file: str) -> str:
        return f"{view.name}/{file}" if self.data.sources else file

    def _open_tasks(self, view: DataConfig, tokenizer: Tokenizer, *, build: bool) -> TaskData:
        return open_task_rows(
            view,
            tokenizer,
            prompt_length=self.prompt_length,
            cache=self.cache,
            seed=self.seed,
            limits=self.limits,
            build=build,
        )


def _notes(tokens: Path, rows: Path, parts: Sequence[str], where: str) -> list[str]:
    """What the prepared tokens and rows hold, and what was left out of them."""
    read, packed = whole_manifest(tokens), whole_manifest(rows)
    notes = LeftOut(read["left_out"]).sentences(where)
    for part in parts:
        found, named = packed[part], f"{where}, {part.replace('_', '-')}"
        notes += [
            f"{named}: {read[part]['documents']:,} documents, {read[part]['tokens']:,} tokens, {found['rows']:,} rows; "
            f"{found['short']:,} documents are shorter than a row and share rows"
        ]
        notes += LeftOut(found["left_out"]).sentences(named)
    return notes


def _joined(names: list[str], parts: list[Rows], weights: list[float] | None = None) -> Rows:
    return parts[0] if len(parts) == 1 else JoinedRows(names, parts, weights)
