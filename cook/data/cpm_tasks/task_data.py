"""Rows of CPM-Ant's tasks for a run: from CPM-Live's binary data, or from downstream JSON lines."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cook.base.errors import UserError
from cook.data.cache import cached_folder, fingerprint_of, read_manifest
from cook.data.corpus import Corpus, open_corpus
from cook.data.cpm_live.dataset import LiveDataset, open_live
from cook.data.cpm_live.meta import write_meta
from cook.data.cpm_live.records import WRONG_CHOICE
from cook.data.cpm_live.writer import LiveWriter
from cook.data.cpm_tasks.downstream import choice_token, record_of
from cook.data.cpm_tasks.task_rows import TaskRows, pack_records
from cook.data.order import chosen_below, mix
from cook.data.reports import LeftOut
from cook.text.tokenizer import Tokenizer

FORMAT = 2
"""Raised whenever the same inputs would give other rows."""

HELD_OUT_RUN = 64
"""Records that are held out together: the pieces of a document are neighbours."""


class TaskData(NamedTuple):
    """The rows of a source of tasks."""

    train: TaskRows
    held_out: TaskRows
    files: dict[str, tuple[int, str]]  # size and hash of every source file
    left_out: LeftOut


def open_task_rows(
    data: Any,
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    cache: Path,
    seed: int,
    build: bool = True,
    limits: Mapping[str, int | None] | None = None,
) -> TaskData:
    """Opens the training and the held-out rows of a data section, and prepares them if that has not been done.

    Args:
        data: `type, paths, held_out, held_out_paths, max_length` of the configuration's data section.
        tokenizer: Of the model; binary data must have been made with it.
        prompt_length: P.
        cache: The folder of prepared data.
        seed: Of the draws of what is hidden.
        build: Prepare what is missing. Otherwise only read.
        limits: The model's `prompt_types` and `segment_types`, where known.

    Raises:
        UserError: The data is unusable, or (`build=False`) has not been prepared.
    """
    opened = cached_folder if build else _only_read
    files: dict[str, tuple[int, str]] = {}
    left_out = LeftOut()

    def records(paths: Sequence[str]) -> LiveDataset:
        if data.type == "downstream":
            corpus = open_corpus("jsonl", paths)
            left_out.include(corpus.left_out.record())
            files.update({file.name: (file.size, file.sha256) for file in corpus.files})
            folder = _downstream(corpus, tokenizer, data.max_length, prompt_length, cache, opened)
            left_out.include((read_manifest(folder) or {})["left_out"])
            paths = [str(folder)]
        found = open_live(live_folders(paths), cache, opened=opened)
        if data.type != "downstream":
            files.update({file.path: (file.size, file.digest) for file in found.files})
        _check(found, tokenizer, limits or {})
        return found

    train = records(data.paths)
    everything = np.arange(len(train))
    if data.held_out_paths:
        held_out = records(data.held_out_paths)
        parts = {"train": (train, everything), "held_out": (held_out, np.arange(len(held_out)))}
    else:
        is_held_out = split_records(len(train), data.held_out)
        parts = {"train": (train, everything[~is_held_out]), "held_out": (train, everything[is_held_out])}
    sizes = {"max_length": data.max_length, "prompt_length": prompt_length}
    key = fingerprint_of("tasks", FORMAT, [found.fingerprint for found, _ in parts.values()], data.held_out, sizes)

    def pack(folder: Path) -> dict[str, Any]:
        options: dict[str, Any] = {**sizes, "folder": folder}
        return sizes | {part: pack_records(*chosen, part=part, **options) for part, chosen in parts.items()}

    folder = opened(cache, "tasks", key, pack)
    asks = any(int(found.column["segment_task"].max(initial=0)) >= WRONG_CHOICE for found, _ in parts.values())
    yes = choice_token(tokenizer) if asks else None
    rows = [TaskRows(found, folder, part, seed=seed, choice_token=yes) for part, (found, _) in parts.items()]
    return TaskData(rows[0], rows[1], files, left_out)


def live_folders(paths: Sequence[str]) -> list[Path]:
    """The folders of binary data that some paths and glob patterns name, in their order, none twice."""
    found: dict[Path, Path] = {}
    for given in paths:
        path = Path(given)
        matches = sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(given) and not path.exists() else [path]
        if not matches:
            raise UserError(f"{given}: matches no folder", wanted="folders with meta.bin")
        for match in matches:
            found.setdefault(match.resolve(), match)
    return list(found.values())


def split_records(count: int, fraction: float) -> np.ndarray:
    """bool (count,), True where held out: runs of `HELD_OUT_RUN` records, chosen by their number alone.

    If there are few records, each is a run of its own. At least one run is on either side.

    Raises:
        UserError: There are fewer than two records, or the fraction is not between 0 and 1.
    """
    run = HELD_OUT_RUN if count >= 100 * HELD_OUT_RUN else 1
    number = np.arange(-(-count // run), dtype=np.uint64)
    chosen = chosen_below(mix(mix(number + np.uint64(1)) + np.uint64(1)).astype(np.float64) / 2.0**64, fraction)
    if count < 2:
        raise UserError("the data has too few records to hold one out", wanted="at least 2", got=count)
    return np.repeat(chosen, run)[:count]


def _check(data: LiveDataset, tokenizer: Tokenizer, limits: Mapping[str, int | None]) -> None:
    if not len(data):
        raise UserError(f"{data.files[0].path}: the data has no records", wanted="at least one")
    if data.largest_token >= tokenizer.vocab_size:
        raise UserError(
            f"{data.place(data.largest_token_record)}: the record contains a token outside the vocabulary",
            wanted=f"below {tokenizer.vocab_size}",
            got=data.largest_token,
            remedy="name the tokenizer with which the data was made",
        )
    for name, column, what in (("prompt_types", "task", "task"), ("segment_types", "segment_type", "segment type")):
        limit = limits.get(name)
        values = data.column[column]
        if limit is not None and int(values.max()) >= limit:
            found = int(values.argmax())
            number = found if column == "task" else int(np.searchsorted(data.segment_begin, found, side="right")) - 1
            raise UserError(
                f"{data.place(number)}: the record contains a {what} that the model does not have",
                wanted=f"below {limit} (the model's {name})",
                got=int(values[found]),
            )


def _only_read(cache: Path, kind: str, fingerprint: str, build: Callable[[Path], dict[str, Any]]) -> Path:
    def refuse(folder: Path) -> dict[str, Any]:
        raise UserError(f"{cache}: nothing is prepared for this configuration", remedy="prepare it on one rank first")

    return cached_folder(cache, kind, fingerprint, refuse)


def _downstream(
    corpus: Corpus, tokenizer: Tokenizer, max_length: int, prompt_length: int, cache: Path, opened: Any
) -> Path:
    """A folder of binary data made of JSON lines, which `open_live` reads."""
    key = fingerprint_of("downstream", FORMAT, corpus.fingerprint(), tokenizer.fingerprint, max_length, prompt_length)

    def build(folder: Path) -> dict[str, Any]:
        options: dict[str, Any] = {"max_length": max_length, "prompt_length": prompt_length, "left_out": LeftOut()}
        with LiveWriter(folder / "data", version=2) as writer:
            for item in corpus.objects():
                writer.write(record_of(item.values, item.where, tokenizer, **options).numbers())
        if not writer.nlines:
            raise UserError("the downstream data is empty", wanted="at least one object")
        write_meta(folder, 2, [writer.info()])
        return {"left_out": options["left_out"].record()}

    return opened(cache, "downstream", key, build)
