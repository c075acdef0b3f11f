"""Writes data files of CPM-Live's binary format, byte for byte as CPM-Live does.

A record is 0x1F and its payload: a pickled int64 array, in version 2 after its length (uint32). A record that would not
leave a byte of its block free begins a new block; 0x00 ends a block and fills it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType

import numpy as np

from cook.base.errors import UserError
from cook.data.cpm_live.meta import DEFAULT_BLOCK_SIZE, FileInfo
from cook.data.cpm_live.pickles import write_array

RECORD = b"\x1f"
END_OF_BLOCK = b"\x00"


class LiveWriter:
    """A context manager that writes one data file, which gets its name only once it is whole."""

    def __init__(self, path: Path, *, version: int, block_size: int = DEFAULT_BLOCK_SIZE):
        self._path, self._version, self._block_size = path, version, block_size
        self._aside = path.with_name(f".{path.name}.tmp")
        self._file = open(self._aside, "wb")
        self._offset = 0
        self.num_blocks, self.nbytes, self.nlines = 1, 0, 0

    def write(self, values: np.ndarray) -> None:
        """Adds one record, int64 (num,); a `UserError` if it does not fit into a block."""
        payload = write_array(values)
        if self._version == 2:
            payload = struct.pack("<I", len(payload)) + payload
        if self._offset + 2 + len(payload) > self._block_size:
            if 2 + len(payload) > self._block_size:
                raise UserError(
                    f"{self._path}: record {self.nlines} is larger than a block",
                    wanted=f"at most {self._block_size - 2} bytes",
                    got=f"{len(payload)} bytes, {len(values)} numbers",
                    remedy="cut it into shorter records, or use a larger block size",
                )
            self._fill_block()
            self.num_blocks += 1
        self._file.write(RECORD)
        self._file.write(payload)
        self._offset += 1 + len(payload)
        self.nbytes += len(payload)
        self.nlines += 1

    def _fill_block(self) -> None:
        self._file.write(END_OF_BLOCK * (self._block_size - self._offset))
        self._offset = 0

    def info(self) -> FileInfo:
        """The file's entry in `meta.bin`, where `write_meta` numbers its blocks."""
        return FileInfo(
            file_name=self._path.name,
            block_begin=0,
            block_end=self.num_blocks,
            nbytes=self.nbytes,
            nlines=self.nlines,
            block_size=self._block_size,
        )

    def __enter__(self) -> LiveWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._fill_block()
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                os.replace(self._aside, self._path)
        finally:
            self._file.close()
            self._aside.unlink(missing_ok=True)
