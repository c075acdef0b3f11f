"""Reads the growing files of a job: its output, the records of its stages, and the values of its gates."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cook.service.below import open_below, read_below

OUTPUT = "run/out"
"""The output folder of a job, relative to the job's folder."""
TEXT_BYTES = 1 << 16
RECORD_BYTES = 1 << 18
MAX_LINE = 1 << 22
GATE_BYTES = 1 << 23
"""At most this many bytes of gate values are returned at once."""
_CHECKED = 256


@dataclass(frozen=True, kw_only=True)
class Text:
    """A piece of a text file."""

    text: str
    offset: int
    """Where it starts, in bytes."""
    next: int
    """Where the next piece starts."""
    size: int
    """The size of the file."""


def read_text(folder: Path, path: str, offset: int, limit: int = TEXT_BYTES) -> Text:
    """Reads a growing text file.

    Args:
        folder: The job's folder.
        path: The file, relative to it.
        offset: The first byte; negative: from the end.
        limit: At most this many bytes.

    Returns:
        The text. A character that is not complete yet is left for the next piece.
    """
    try:
        handle = open_below(folder, path)
    except FileNotFoundError:
        return Text(text="", offset=0, next=0, size=0)
    with open(handle, "rb") as file:
        size = os.fstat(handle).st_size
        start = min(offset, size) if offset >= 0 else max(0, size + offset)
        file.seek(start)
        content = file.read(limit)
    whole = content[: len(content) - _cut(content)]
    return Text(text=whole.decode("utf-8", "replace"), offset=start, next=start + len(whole), size=size)


def _cut(content: bytes) -> int:
    """How many bytes at the end are the beginning of a character."""
    for back in range(1, min(4, len(content)) + 1):
        byte = content[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if back < length else 0
        if byte < 0x80:
            return 0
    return 0


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How far a file has been read, and how to notice that it was replaced."""

    inode: int
    offset: int
    check: str
    """A hash of the bytes before the offset: an inode number may be used again."""

    def as_json(self) -> list[Any]:
        return [self.inode, self.offset, self.check]

    @classmethod
    def from_json(cls, value: Any) -> Mark | None:
        """The mark that `as_json` described, or None for any other value."""
        if not isinstance(value, list) or [type(part) for part in value] != [int, int, str] or value[1] < 0:
            return None
        return cls(inode=value[0], offset=value[1], check=value[2])


@dataclass(frozen=True, kw_only=True)
class Records:
    """New records of a file."""

    reset: bool
    """Whether earlier records are no longer valid, since the file was replaced or is read for the first time."""
    records: list[dict[str, Any]]
    mark: Mark | None
    more: bool
    """Whether there are further records already."""


def read_records(folder: Path, path: str, mark: Mark | None, limit: int = RECORD_BYTES) -> Records:
    """Reads the lines that a `log.jsonl` has gained; lines that are no JSON objects are skipped.

    Args:
        folder: The job's folder.
        path: The file, relative to it.
        mark: Where the last reading ended; None: read from the start.
        limit: About how many bytes to read.
    """
    try:
        handle = open_below(folder, path)
    except FileNotFoundError:
        return Records(reset=mark is not None, records=[], mark=None, more=False)
    with open(handle, "rb") as file:
        seen = os.fstat(handle)
        grown = mark is not None and _is_same(file, seen, mark)
        offset = mark.offset if mark is not None and grown else 0
        file.seek(offset)
        records, start = [], offset
        while offset - start < limit:
            line = file.readline(MAX_LINE)
            if not line.endswith(b"\n") and len(line) < MAX_LINE:
                break
            offset += len(line)
            records += _parsed(line)
        new = Mark(inode=seen.st_ino, offset=offset, check=_check(file, offset))
        return Records(reset=not grown, records=records, mark=new, more=offset - start >= limit)


def _is_same(file: BinaryIO, seen: os.stat_result, mark: Mark) -> bool:
    return seen.st_ino == mark.inode and seen.st_size >= mark.offset and _check(file, mark.offset) == mark.check


def _check(file: BinaryIO, offset: int) -> str:
    start = max(0, offset - _CHECKED)
    file.seek(start)
    return hashlib.sha256(file.read(offset - start)).hexdigest()[:12]


def _parsed(line: bytes) -> list[dict[str, Any]]:
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return []
    return [record] if isinstance(record, dict) else []


@dataclass(frozen=True, kw_only=True)
class GateLog:
    """The gate log of a stage: fixed-size records of a step and one byte per unit."""

    folder: Path
    stage: str
    groups: list[dict[str, Any]]

    @property
    def units(self) -> int:
        return sum(group["units"] for group in self.groups)

    @property
    def path(self) -> str:
        return f"{OUTPUT}/{self.stage}/gates.bin"

    def records(self, *, after: int | None = None, points: int = 1000) -> list[dict[str, Any]]:
        """Records later than a step, evenly spaced and with the last one.

        Args:
            after: A step; None: from the first record.
            points: At most this many records, and at most `GATE_BYTES` in total.
        """
        try:
            handle = open_below(self.folder, self.path)
        except FileNotFoundError:
            return []
        size = 4 + self.units
        with open(handle, "rb") as file:
            count = os.fstat(handle).st_size // size
            first = 0 if after is None else bisect_right(range(count), after, key=lambda n: _step(file, n, size))
            points = max(1, min(points, GATE_BYTES // size))
            return [self._record(file, number, size) for number in _spread(first, count, points)]

    def _record(self, file: BinaryIO, number: int, size: int) -> dict[str, Any]:
        step = _step(file, number, size)
        return {"step": step, "values": base64.b64encode(file.read(size - 4)).decode()}


def open_gates(folder: Path, stage: str) -> GateLog | None:
    """The gate log of a stage; None if the stage has none."""
    try:
        content = json.loads(read_below(folder, f"{OUTPUT}/{stage}/gates.json"), parse_constant=lambda _: None)
        groups = content["groups"]
        if not all(type(group["units"]) is int and group["units"] > 0 for group in groups):
            return None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return GateLog(folder=folder, stage=stage, groups=groups) if groups else None


def _step(file: BinaryIO, number: int, size: int) -> int:
    file.seek(number * size)
    return struct.unpack("<I", file.read(4))[0]


def _spread(first: int, count: int, points: int) -> Sequence[int]:
    """At most `points` numbers from `first` to `count - 1`, evenly spaced, with the last one."""
    left = count - first
    if left <= points:
        return range(first, count)
    return sorted({count - 1 - (left - 1) * number // max(1, points - 1) for number in range(points)})
