"""Records of binary data written again: merged, shuffled, or converted between versions and JSON lines.

A JSON line is `{"task": …, "segments": [[length, type, task], …], "tokens": […]}`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from cook.base.errors import UserError
from cook.base.seeds import derived_seed
from cook.data.commands import common
from cook.data.corpus import JSONL_SUFFIXES, object_of
from cook.data.cpm_live.meta import FileInfo, LiveMeta, read_meta, write_meta
from cook.data.cpm_live.records import BadRecord, read_record
from cook.data.order import mix
from cook.data.reports import Progress
from cook.data.source_files import has_ending, lines_of, opened

MAX_BUCKETS = 512
"""Files that `shuffle` opens at once."""


def merge(sources: Sequence[Path], output: Path, *, version: int | None) -> None:
    """Merges folders into a new one, in their order.

    Files of one version and block size are copied as they are. Otherwise the records are written anew, with the block
    size of the first folder, in the given version or that of the first folder.

    Raises:
        UserError: a source is not a folder of binary data, or the output is not empty.
    """
    metas = [read_meta(folder) for folder in sources]
    version = version or metas[0].version
    block_size = metas[0].files[0].block_size
    assert block_size is not None
    folder = common.new_folder(output)
    shown = [(meta, file) for meta in metas for file in meta.shown]
    same = all(meta.version == version and file.block_size == block_size for meta, file in shown)
    with Progress("merging", sum(file.nbytes for _, file in shown)) as progress:
        if same:
            infos = _copy(shown, folder, version, progress)
        else:
            records = (values for meta in metas for values in common.all_numbers(meta, progress))
            infos = common.write_folder(folder, records, version=version, block_size=block_size)
    how = "copied" if same else f"written anew in version {version}"
    print(f"{folder}: {sum(info.nlines for info in infos)} records in {len(infos)} file(s), {how}")


def _copy(files: Sequence[tuple[LiveMeta, FileInfo]], folder: Path, version: int, progress: Progress) -> list[FileInfo]:
    infos: list[FileInfo] = []
    taken = set()
    for meta, file in files:
        name, number = file.file_name, 1
        while name in taken:
            number += 1
            name = f"{file.file_name}-{number}"
        taken.add(name)
        shutil.copyfile(meta.folder / file.file_name, folder / name)
        infos.append(replace(file, file_name=name))
        progress.advance(file.nbytes)
    write_meta(folder, version, infos)
    return infos


def shuffle(source: Path, output: Path, *, seed: int, memory: int) -> None:
    """Writes the records of `source` to a new folder in an order that depends on the seed alone.

    Every record gets a random key from the seed and its number. Records go into buckets on the disk by their keys;
    then each bucket is sorted in memory, which takes about `memory` bytes, and written.

    Raises:
        UserError: the source is not binary data, the output is not empty, or the memory too small.
    """
    meta = read_meta(source)
    total = sum(file.nbytes for file in meta.shown)
    buckets = 1
    while total / buckets > memory / 2:  # sorting copies a bucket
        buckets *= 2
    if buckets > MAX_BUCKETS:
        least = f"{-(-2 * total // MAX_BUCKETS >> 20)}M"
        raise UserError("--memory is too small for this data", wanted=f"at least {least}", got=memory)
    folder = common.new_folder(output)
    aside = folder / ".buckets"
    aside.mkdir()
    block_size = meta.files[0].block_size
    assert block_size is not None
    try:
        with Progress("shuffling", 2 * total) as progress:
            sizes = _deal(common.all_numbers(meta, progress), aside, buckets, seed)
            shuffled = _sorted(aside, sizes, progress)
            infos = common.write_folder(folder, shuffled, version=meta.version, block_size=block_size)
    except BaseException:
        for path in folder.glob("data-*"):
            path.unlink()
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    count = sum(info.nlines for info in infos)
    print(f"{folder}: {count} records in {len(infos)} file(s), in the order of seed {seed}")


def _deal(records: Iterator[np.ndarray], aside: Path, buckets: int, seed: int) -> list[list[tuple[int, int]]]:
    """Writes every record into its bucket's file; returns each bucket's (key, number of values) per record."""
    base, shift = np.uint64(derived_seed(seed, "shuffle")), 64 - (buckets - 1).bit_length()
    sizes: list[list[tuple[int, int]]] = [[] for _ in range(buckets)]
    with ExitStack() as stack:
        files = [stack.enter_context(open(aside / str(number), "wb")) for number in range(buckets)]
        for number, values in enumerate(records):
            key = int(mix(mix(base + np.array([number], np.uint64)))[0])
            files[key >> shift].write(values.tobytes())
            sizes[key >> shift].append((key, len(values)))
    return sizes


def _sorted(aside: Path, sizes: list[list[tuple[int, int]]], progress: Progress) -> Iterator[np.ndarray]:
    for bucket, entries in enumerate(sizes):
        values = np.fromfile(aside / str(bucket), np.int64)
        begins = np.cumsum([0, *(size for _, size in entries)])
        for _, index in sorted((key, index) for index, (key, _) in enumerate(entries)):
            progress.advance(8 * entries[index][1])
            yield values[begins[index] : begins[index + 1]]
        (aside / str(bucket)).unlink()


def convert(source: Path, target: Path, *, version: int, block_size: int) -> None:
    """Converts a folder of binary data or a `.jsonl` file; a target that ends in `.jsonl` is a file.

    Raises:
        UserError: no such source, or the target exists.
    """
    meta = None if has_ending(source.name, JSONL_SUFFIXES) else read_meta(source)
    if meta is None and not source.is_file():
        raise UserError(f"{source}: there is no such file", wanted="a folder of binary data, or a .jsonl file")
    total = source.stat().st_size if meta is None else sum(file.nbytes for file in meta.shown)
    with Progress("converting", total) as progress:
        records = _from_lines(source, progress) if meta is None else common.all_numbers(meta, progress)
        if has_ending(target.name, JSONL_SUFFIXES, compressed=False):
            count = _to_lines(records, target)
        else:
            infos = common.write_folder(common.new_folder(target), records, version=version, block_size=block_size)
            count = sum(info.nlines for info in infos)
    print(f"{target}: {count} records")


def _to_lines(records: Iterator[np.ndarray], target: Path) -> int:
    common.check_new_file(target)
    aside = target.with_name(f".{target.name}.tmp")
    count = 0
    try:
        with open(aside, "w", encoding="utf-8") as file:
            for count, values in enumerate(records, start=1):  # noqa: B007
                record = read_record(values)
                line = {"task": record.task, "segments": record.segments, "tokens": record.tokens.tolist()}
                file.write(json.dumps(line) + "\n")
        aside.rename(target)
    except OSError as error:
        raise UserError(f"--output: {target} cannot be written: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)
    return count


def _from_lines(source: Path, progress: Progress) -> Iterator[np.ndarray]:
    with opened(source) as file:
        for number, (_, line) in enumerate(lines_of(file, source), start=1):
            progress.advance(len(line))
            if line.strip():
                yield _numbers(line, f"{source}, line {number}")


def _numbers(line: bytes, where: str) -> np.ndarray:
    value = object_of(line, where)
    missing = [key for key in ("task", "segments", "tokens") if key not in value]
    if missing:
        raise UserError(f"{where}: the object has no key {missing[0]!r}", wanted='"task", "segments" and "tokens"')
    try:
        flat = [number for segment in value["segments"] for number in segment]
        if len(flat) != 3 * len(value["segments"]):
            raise BadRecord("a segment is not [length, type, task]")
        values = [value["task"], len(value["segments"]), *flat, *value["tokens"]]
        if not all(type(number) is int for number in values):
            raise BadRecord("not all of its values are integers")
        numbers = np.array(values, np.int64)
        read_record(numbers)
    except (BadRecord, TypeError, OverflowError) as error:
        raise UserError(f"{where}: no record: {error}") from None
    return numbers
