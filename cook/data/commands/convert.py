"""Binary data of version 1 or 2 and JSON lines, each into each other; the records stay the same to the token.

A JSON line is `{"task": …, "segments": [[length, type, task], …], "tokens": […]}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cook.base.errors import UserError
from cook.data.commands import common
from cook.data.corpus import JSONL_SUFFIXES, object_of
from cook.data.cpm_live.meta import read_meta
from cook.data.cpm_live.records import BadRecord, read_record
from cook.data.progress import Progress
from cook.data.source_files import has_ending, lines_of, opened


def convert(source: Path, target: Path, *, version: int, block_size: int) -> None:
    """Converts a folder of binary data or a `.jsonl` file; a target that ends in `.jsonl` is a file.

    Raises:
        UserError: no such source, or the target exists.
    """
    meta = None if has_ending(source.name, JSONL_SUFFIXES) else read_meta(source)
    if meta is None and not source.is_file():
        raise UserError(f"{source}: there is no such file", wanted="a folder of binary data, or a .jsonl file")
    total = source.stat().st_size if meta is None else sum(file.nbytes for file in meta.shown)
    with Progress("converting", total, unit="MB", scale=1e6) as progress:
        records = _from_lines(source, progress) if meta is None else common.all_numbers(meta, progress)
        if has_ending(target.name, JSONL_SUFFIXES, compressed=False):
            count = _to_lines(records, target)
        else:
            infos = common.write_folder(common.new_folder(target), records, version=version, block_size=block_size)
            count = sum(info.nlines for info in infos)
    print(f"{target}: {count} records")


def _to_lines(records: Iterator[np.ndarray], target: Path) -> int:
    if target.exists():
        raise UserError(f"--output: {target} is there already", wanted="a new file")
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
