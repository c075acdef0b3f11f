"""One pass over blocks of a data file: checks every record, notes where its tokens are, hashes every block."""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cook.base.errors import UserError
from cook.data.cpm_live.pickles import INT64, read_array
from cook.data.cpm_live.records import LM, MASKED_LM, BadRecord, read_header
from cook.data.cpm_live.symbols import PickleRefused

COLUMNS: dict[str, np.dtype] = {
    "offset": np.dtype(np.int64),  # of the record's first token, in its file
    "tokens": np.dtype(np.int32),  # how many
    "task": np.dtype(np.int32),
    "segments": np.dtype(np.int32),  # how many
    "segment_length": np.dtype(np.int32),
    "segment_type": np.dtype(np.int16),
    "segment_task": np.dtype(np.int16),
}
"""The first four per record, the others per segment."""

MAGIC, END_OF_BLOCK = 0x1F, 0x00
MAX_KNOWN_HEADS = 1 << 16


@dataclass(frozen=True)
class Scanned:
    """The content of some blocks of a file."""

    columns: dict[str, np.ndarray]
    nbytes: int  # of the records, as `meta.bin` counts them
    digests: bytes  # SHA-256 of every block, one after the other
    largest: tuple[int, int]  # the largest token and its record, counted from the first block here; (-1, -1) if none


def place(path: Path, block: int, offset: int) -> str:
    """A place in the data for error messages; `block` counts inside the file."""
    shown = os.path.relpath(path)
    return f"{path if shown.startswith('..') else shown}, block {block}, offset {offset}"


def map_file(path: str | Path) -> mmap.mmap:
    """Maps a file; the map lives as long as an array that looks into it."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def scan_blocks(path: Path, version: int, block_size: int, first: int, count: int) -> Scanned:
    """Scans `count` blocks of a file from block `first` on; a `UserError` if one is damaged."""
    scanner = _Scanner(version)
    digests = []
    content = map_file(path)
    for block in range(first, first + count):
        begin, end = block * block_size, (block + 1) * block_size
        if end > len(content):
            raise UserError(
                f"{place(path, block, len(content))}: truncated, the block is not whole",
                remedy="copy or make the file again",
            )
        try:
            scanner.scan(content, begin, end)
        except PickleRefused as refused:
            raise _damaged(path, block, refused) from None
        digests.append(hashlib.sha256(memoryview(content)[begin:end]).digest())
    columns = {name: np.asarray(values, COLUMNS[name]) for name, values in scanner.columns.items()}
    return Scanned(columns, scanner.nbytes, b"".join(digests), scanner.largest)


def read_numbers(path: Path, version: int, block_size: int, num_blocks: int) -> Iterator[np.ndarray]:
    """The records of a file as their numbers, int64 (num,), read-only; a `UserError` if it is damaged."""
    scanner = _Scanner(version)
    content = map_file(path)
    for block in range(num_blocks):
        try:
            for data, count in scanner.records(content, block * block_size, (block + 1) * block_size):
                yield np.frombuffer(content, INT64, count, data)
        except PickleRefused as refused:
            raise _damaged(path, block, refused) from None


def _damaged(path: Path, block: int, refused: PickleRefused) -> UserError:
    return UserError(
        f"{place(path, block, refused.offset)}: {refused.reason}",
        remedy="the file is damaged or is not CPM-Ant data; copy it again, or mask it in meta.bin",
    )


def _length(content: Any, payload: int) -> int:
    return struct.unpack_from("<I", content, payload - 4)[0]


class _Scanner:
    def __init__(self, version: int):
        self.version = version
        self.columns: dict[str, list[int]] = {name: [] for name in COLUMNS}
        self.nbytes = 0
        self.largest = (-1, -1)
        # Records with equally many numbers begin and end with the same bytes: known ones are not parsed again.
        self.known: dict[bytes, tuple[int, bytes]] = {}
        self.head_lengths: list[int] = []

    def scan(self, content: Any, begin: int, end: int) -> None:
        """Notes every record of a block."""
        for data, count in self.records(content, begin, end):
            try:
                self.note(content, data, count)
            except BadRecord as bad:
                raise PickleRefused(data, f"a bad record: {bad}") from None

    def records(self, content: Any, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Offset of the first number of every record of a block, and how many numbers it has."""
        at = begin
        while (payload := self.next_payload(content, at, end)) is not None:
            limit = end if self.version == 1 else payload + _length(content, payload)
            data, count, at = self.locate(content, payload, limit)
            if self.version == 2 and at != limit:
                raise PickleRefused(payload, f"the record has {limit - payload} bytes, its array {at - payload}")
            self.nbytes += at - payload + (4 if self.version == 2 else 0)
            yield data, count

    def next_payload(self, content: Any, at: int, end: int) -> int | None:
        """Offset of the payload of the record at `at`; None at the block's end."""
        if at >= end:
            raise PickleRefused(at, "the block has no end (0x00): truncated, or of another block size")
        magic = content[at]
        if magic == END_OF_BLOCK:
            return None
        if magic != MAGIC:
            raise PickleRefused(at, f"the byte 0x{magic:02x} where a record (0x1f) or the block's end (0x00) should be")
        payload = at + (1 if self.version == 1 else 5)
        if self.version == 2 and (payload > end or payload + _length(content, payload) >= end):
            raise PickleRefused(at, "the record is longer than the rest of its block")
        return payload

    def locate(self, content: Any, payload: int, limit: int) -> tuple[int, int, int]:
        """Offset of the record's first number, how many there are, and the offset after its payload."""
        for length in self.head_lengths:
            hit = self.known.get(content[payload : payload + length])
            if hit is not None:
                size, tail = hit
                data = payload + length
                after = data + size + len(tail)
                if after <= limit and content[data + size : after] == tail:
                    return data, size // INT64.itemsize, after
        stretch, after = read_array(content, payload, limit)
        if len(self.known) < MAX_KNOWN_HEADS:
            self.known[content[payload : stretch.begin]] = (stretch.end - stretch.begin, content[stretch.end : after])
            if stretch.begin - payload not in self.head_lengths:
                self.head_lengths.insert(0, stretch.begin - payload)
        return stretch.begin, (stretch.end - stretch.begin) // INT64.itemsize, after

    def note(self, content: Any, data: int, count: int) -> None:
        numbers = np.frombuffer(content, INT64, count, data)
        head = struct.unpack_from("<5q", content, data) if count >= 5 else (-1, 0, 0, 0, 0)
        columns = self.columns
        # Nearly all records: one segment, of one of the two tasks of pretraining.
        is_plain = head[1:3] == (1, count - 5) and head[4] in (MASKED_LM, LM)
        if is_plain and 0 <= min(head) and max(head) < 1 << 15:
            task, num_segments = head[0], 1
            columns["segment_length"].append(head[2])
            columns["segment_type"].append(head[3])
            columns["segment_task"].append(head[4])
        else:
            task, segments = read_header(numbers)
            num_segments = len(segments)
            for segment in segments:
                columns["segment_length"].append(segment.length)
                columns["segment_type"].append(segment.type)
                columns["segment_task"].append(segment.task)
        header = 2 + 3 * num_segments
        columns["offset"].append(data + header * INT64.itemsize)
        columns["tokens"].append(count - header)
        columns["task"].append(task)
        columns["segments"].append(num_segments)
        if count > header:
            # As unsigned numbers the negative ones are the largest.
            largest = int(numbers[header:].view(np.uint64).max())
            if largest >= 1 << 31:
                raise BadRecord(f"the token {largest if largest < 1 << 63 else largest - (1 << 64)} is impossible")
            if largest > self.largest[0]:
                self.largest = (largest, len(columns["offset"]) - 1)
