"""A set of CPM-Live folders as one numbered list of records, mapped into memory, any record in constant time.

The first opening scans all data once, in several processes, and keeps an index in the cache: where every record's
tokens are, its segments, a hash of every block. The index is used again as long as the files have the same sizes and
modification times. A resumed run compares its hash over the blocks.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cook.base.errors import UserError
from cook.base.pool import in_order, num_cores
from cook.data.cache import cached_folder, fingerprint_of, mapped, whole_manifest
from cook.data.cpm_live.meta import FileInfo, LiveMeta, read_meta
from cook.data.cpm_live.pickles import INT64
from cook.data.cpm_live.records import Record, Segment
from cook.data.cpm_live.scan import COLUMNS, Scanned, map_file, place, scan_blocks
from cook.data.reports import Progress

FORMAT = 1
"""Raised whenever the same files would give another index."""

DIGEST_BYTES = 32
CHUNK_BYTES = 256 << 20
"""One process scans this much at a time."""


@dataclass(frozen=True)
class DataFile:
    """A data file as it was when it was scanned."""

    path: str
    version: int
    block_size: int
    size: int
    mtime_ns: int
    first_record: int  # its number in the whole list
    first_block: int  # its number among the blocks of all files
    digest: str  # SHA-256 over the SHA-256 of its blocks


def open_live(
    folders: Sequence[str | Path], cache: Path, workers: int | None = None, opened: Callable[..., Path] = cached_folder
) -> LiveDataset:
    """Opens the records of some folders, and scans them if that has not been done yet.

    Args:
        folders: Folders with `meta.bin`, in the order in which their records are numbered.
        cache: The folder of the index.
        workers: Processes that scan. None: one per core that this process may use.
        opened: Returns the index's folder, as `cached_folder` does.

    Raises:
        UserError: The data is missing, damaged, or not as `meta.bin` says: with file, block and offset.
    """
    metas = [read_meta(folder) for folder in folders]
    seen = [[str(meta.folder.resolve()), meta.version, [_seen(meta, file) for file in meta.shown]] for meta in metas]

    key = fingerprint_of("index", FORMAT, seen)
    return LiveDataset(opened(cache, "index", key, lambda folder: _scan_all(metas, folder, workers)))


def _seen(meta: LiveMeta, file: FileInfo) -> list[Any]:
    stat = (meta.folder / file.file_name).stat()
    return [asdict(file), stat.st_size, stat.st_mtime_ns]


class LiveDataset:
    """Records by number, from the folder of an index. A pickled instance maps the files again where it arrives."""

    def __init__(self, index: Path):
        manifest = whole_manifest(index)
        self._index = index
        self.files = tuple(DataFile(**file) for file in manifest["data"])
        self.largest_token: int = manifest["largest_token"]
        self.largest_token_record: int = manifest["largest_token_record"]
        self.fingerprint = fingerprint_of("live", FORMAT, [file.digest for file in self.files])
        self.column = {name: mapped(index / f"{name}.bin", dtype) for name, dtype in COLUMNS.items()}
        self.segment_begin = mapped(index / "segment_begin.bin", np.int64)  # (N + 1,), the first segment per record
        self._first_F = np.array([file.first_record for file in self.files], np.int64)
        self._maps: dict[int, mmap.mmap] = {}
        self._seen: dict[int, tuple[int, int]] = {}

    def __reduce__(self) -> tuple:
        return type(self), (self._index,)

    def __len__(self) -> int:
        return len(self.column["offset"])

    def tokens(self, records: np.ndarray) -> list[np.ndarray]:
        """Tokens int64 (num_tokens,) of some records: views into the mapped files, which must not have changed."""
        file_N = np.searchsorted(self._first_F, records, side="right") - 1
        for number in np.unique(file_N).tolist():
            self._check_unchanged(number)
        offset_N, count_N = self.column["offset"][records].tolist(), self.column["tokens"][records].tolist()
        maps = self._maps
        return [
            np.frombuffer(maps[number], INT64, count, offset)
            for number, count, offset in zip(file_N.tolist(), count_N, offset_N, strict=True)
        ]

    def record(self, number: int) -> Record:
        begin, end = self.segment_begin[number : number + 2].tolist()
        parts = (self.column[f"segment_{name}"][begin:end].tolist() for name in ("length", "type", "task"))
        segments = tuple(Segment(*values) for values in zip(*parts, strict=True))
        return Record(int(self.column["task"][number]), segments, self.tokens(np.array([number]))[0])

    def place(self, number: int) -> str:
        """File, block and offset of a record's tokens, for messages."""
        file = self.files[int(np.searchsorted(self._first_F, number, side="right")) - 1]
        offset = int(self.column["offset"][number])
        return place(Path(file.path), offset // file.block_size, offset)

    def _check_unchanged(self, number: int) -> None:
        """A `UserError` if a file has changed: reading a mapped file that is now shorter would kill the process."""
        file = self.files[number]
        try:
            stat = os.stat(file.path)
            found = (stat.st_size, stat.st_mtime_ns)
        except OSError:
            raise UserError(f"{place(Path(file.path), 0, 0)}: the file no longer exists", remedy="restore it") from None
        if found != self._seen.setdefault(number, (file.size, file.mtime_ns)):
            block = self._first_changed_block(file, found[0])
            if block is not None:
                raise UserError(
                    f"{place(Path(file.path), block, block * file.block_size)}: changed since it was first read",
                    wanted=f"{file.size} bytes, this block as it was",
                    got=f"{found[0]} bytes",
                    remedy="put the old file back, or start again with the new one",
                )
            self._seen[number] = found  # touched or copied, not changed
        if number not in self._maps:
            self._maps[number] = map_file(file.path)

    def _first_changed_block(self, file: DataFile, size: int) -> int | None:
        digests = np.fromfile(self._index / "digests.bin", f"V{DIGEST_BYTES}")[file.first_block :]
        blocks = file.size // file.block_size
        with open(file.path, "rb") as content:
            for block in range(blocks):
                if hashlib.sha256(content.read(file.block_size)).digest() != digests[block].tobytes():
                    return block
        return None if size == file.size else blocks


def _scan_all(metas: Sequence[LiveMeta], folder: Path, workers: int | None) -> dict[str, Any]:
    """Writes the columns of the index into `folder`; returns its other facts."""
    files: list[dict[str, Any]] = []
    records, blocks, largest = 0, 0, (-1, -1)
    jobs = [(meta, file) for meta in metas for file in meta.shown]
    total = sum((meta.folder / file.file_name).stat().st_size for meta, file in jobs)
    with ExitStack() as stack:
        columns = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in COLUMNS}
        begins = stack.enter_context(open(folder / "segment_begin.bin", "wb"))
        digests = stack.enter_context(open(folder / "digests.bin", "wb"))
        segments = np.zeros(1, np.int64)
        begins.write(segments.tobytes())
        progress = stack.enter_context(Progress("reading the index", total))
        for meta, file in jobs:
            path = meta.folder / file.file_name
            stat, first, nbytes, digest = path.stat(), records, 0, hashlib.sha256()
            for part in _scan_file(path, meta.version, file, workers):
                for name, column in columns.items():
                    column.write(part.columns[name].tobytes())
                ends = segments[-1] + np.cumsum(part.columns["segments"], dtype=np.int64)
                begins.write(ends.tobytes())
                segments = ends if len(ends) else segments
                largest = max(largest, (part.largest[0], records + part.largest[1]), key=lambda item: item[0])
                records += len(part.columns["offset"])
                nbytes += part.nbytes
                digest.update(part.digests)
                digests.write(part.digests)
                progress.advance(len(part.digests) // DIGEST_BYTES * (file.block_size or 0))
            _check_counts(path, file, records - first, nbytes)
            entry = DataFile(
                path=str(path.resolve()),
                version=meta.version,
                block_size=file.block_size or 0,
                size=stat.st_size,
                mtime_ns=stat.st_mtime_ns,
                first_record=first,
                first_block=blocks,
                digest=digest.hexdigest(),
            )
            files.append(asdict(entry))
            blocks += file.num_blocks
    return {"data": files, "records": records, "largest_token": largest[0], "largest_token_record": largest[1]}


def _scan_file(path: Path, version: int, file: FileInfo, workers: int | None) -> Iterator[Scanned]:
    """The scan of a file, in order, a chunk at a time."""
    assert file.block_size is not None
    blocks = max(1, CHUNK_BYTES // file.block_size)
    chunks = [
        (path, version, file.block_size, first, min(blocks, file.num_blocks - first))
        for first in range(0, file.num_blocks, blocks)
    ]
    return in_order(scan_blocks, chunks, min(len(chunks), workers or num_cores()))


def _check_counts(path: Path, file: FileInfo, nlines: int, nbytes: int) -> None:
    if (nlines, nbytes) != (file.nlines, file.nbytes):
        raise UserError(
            f"{path}: not the file that meta.bin describes, blocks 0 to {file.num_blocks - 1}",
            wanted=f"{file.nlines} records of {file.nbytes} bytes",
            got=f"{nlines} records of {nbytes} bytes, up to offset {path.stat().st_size}",
            remedy="the file or meta.bin is damaged or of another copy: copy both again",
        )
