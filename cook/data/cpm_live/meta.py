"""`meta.bin`: which files a CPM-Live folder has, and which blocks of the whole each of them holds.

Version 1 (CPM-Ant): a pickled list. Version 2 (CPM-Bee): JSON lines, which also give the block size.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cook.base.errors import UserError
from cook.base.files import regular_file, write_atomically
from cook.data.cpm_live.pickles import read_files, write_files
from cook.data.cpm_live.symbols import PickleRefused

META = "meta.bin"
DEFAULT_BLOCK_SIZE = 16 << 20
MAX_META_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """One data file of a folder."""

    file_name: str  # inside the folder
    block_begin: int  # number of its first block, counted over all files of the folder
    block_end: int
    nbytes: int  # of its records without the magic; in version 2 with their lengths
    nlines: int  # its records
    mask: bool = False  # True: the file is not read
    block_size: int | None = None  # bytes; None where version 1 does not say

    @property
    def num_blocks(self) -> int:
        return self.block_end - self.block_begin


@dataclass(frozen=True, kw_only=True)
class LiveMeta:
    """A folder's list of files, each with its block size."""

    folder: Path
    version: int
    files: tuple[FileInfo, ...]

    @property
    def shown(self) -> tuple[FileInfo, ...]:
        """The files that are read."""
        return tuple(file for file in self.files if not file.mask)


def read_meta(folder: str | Path) -> LiveMeta:
    """Reads a folder's `meta.bin` and checks it against the sizes of the files.

    Raises:
        UserError: There is none, it is damaged, or a file is missing or does not have the size of its blocks.
    """
    folder = Path(folder)
    path = regular_file(folder / META, "file; a folder of CPM-Live binary data has one")
    if path.stat().st_size > MAX_META_BYTES:
        raise UserError(f"{path}: too large to be a list of files", wanted=f"at most {MAX_META_BYTES} bytes")
    content = path.read_bytes()
    if content[:1] == b"\x80":
        version, files = 1, _read_version_1(path, content)
    elif content.lstrip()[:1] == b"{":
        version, files = 2, _read_version_2(path, content)
    else:
        raise UserError(
            f"{path}: neither version 1 (a pickle, byte 0x80 first) nor version 2 (JSON lines)",
            got="an empty file" if not content else f"first bytes {content[:8]!r}",
        )
    _check_blocks(path, files)
    return LiveMeta(folder=folder, version=version, files=_with_block_sizes(folder, files))


def write_meta(folder: Path, version: int, files: Sequence[FileInfo]) -> None:
    """Writes `meta.bin`, whole or not at all; numbers the blocks of the files in their order."""
    ends = [0, *itertools.accumulate(file.num_blocks for file in files)]
    files = [
        replace(file, block_begin=begin, block_end=end)
        for file, (begin, end) in zip(files, itertools.pairwise(ends), strict=True)
    ]
    if version == 1:
        states = [(f.file_name, f.block_begin, f.block_end, f.nbytes, f.nlines, f.mask) for f in files]
        write_atomically(folder / META, write_files(states))
    else:
        write_atomically(folder / META, "".join(json.dumps(asdict(file)) + "\n" for file in files))


def _read_version_1(path: Path, content: bytes) -> list[FileInfo]:
    keys = ("file_name", "block_begin", "block_end", "nbytes", "nlines", "mask")
    try:
        return [FileInfo(**dict(zip(keys, state, strict=True))) for state in read_files(content)]
    except PickleRefused as refused:
        raise UserError(
            f"{path}: not the list of files of a CPM-Live folder, byte {refused.offset}",
            got=refused.reason,
            remedy="nothing of it was run; do not use a file that you do not trust",
        ) from None


def _read_version_2(path: Path, content: bytes) -> list[FileInfo]:
    files = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            files.append(_file_of(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"no {error} in it" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}, line {number}: not the description of a file", got=reason) from None
    return files


def _file_of(value: Any) -> FileInfo:
    if not isinstance(value, dict):
        raise TypeError("not a JSON object")
    kinds = {"file_name": str, "block_begin": int, "block_end": int, "nbytes": int, "nlines": int, "mask": bool}
    wrong = [key for key, kind in kinds.items() if type(value[key]) is not kind]
    size = value.get("block_size")
    wrong += ["block_size"] if size is not None and (type(size) is not int or size < 2) else []
    if wrong:
        raise TypeError(f"the value of {wrong[0]} is {value[wrong[0]]!r}")
    return FileInfo(**{key: value[key] for key in kinds}, block_size=size)


def _check_blocks(path: Path, files: Sequence[FileInfo]) -> None:
    if not files:
        raise UserError(f"{path}: the list of files is empty", wanted="at least one data file")
    expected = 0
    for number, file in enumerate(files):
        name = file.file_name
        if not name or name in (".", "..", META) or any(mark in name for mark in ("/", "\\", "\0")):
            raise UserError(f"{path}: entry {number} names a file outside of the folder", got=repr(name[:200]))
        if file.block_begin != expected or file.block_end <= file.block_begin:
            wanted = f"blocks from {expected} on, at least one"
            got = f"blocks {file.block_begin} to {file.block_end}"
            raise UserError(f"{path}: entry {number} ({name}) has impossible blocks", wanted=wanted, got=got)
        if file.nbytes < 0 or file.nlines < 0:
            raise UserError(f"{path}: entry {number} ({name}) has a negative count", got=[file.nbytes, file.nlines])
        expected = file.block_end


def _with_block_sizes(folder: Path, files: Sequence[FileInfo]) -> tuple[FileInfo, ...]:
    """Finds the block size where it is not given, and checks the size of every file that is read."""
    sizes = {}
    shown = [file for file in files if not file.mask]
    for file in shown:
        try:
            sizes[file.file_name] = (folder / file.file_name).stat().st_size
        except OSError as error:
            raise UserError(
                f"{folder / file.file_name}: cannot be read: {error.strerror}",
                remedy=f"put back the file that {META} lists, or mask it",
            ) from None
    guess = _common_block_size([(sizes[file.file_name], file.num_blocks) for file in shown])
    done = tuple(replace(file, block_size=file.block_size or guess) for file in files)
    for file in done:
        assert file.block_size is not None
        if not file.mask and sizes[file.file_name] != file.num_blocks * file.block_size:
            size = sizes[file.file_name]
            block = min(size // file.block_size, file.num_blocks)
            raise UserError(
                f"{folder / file.file_name}: truncated or changed: block {block} is not whole, offset {size}",
                wanted=f"{file.num_blocks} block(s) of {file.block_size} bytes = {file.num_blocks * file.block_size}",
                got=f"{size} bytes",
            )
    return done


def _common_block_size(sizes: Sequence[tuple[int, int]]) -> int:
    """The one block size with which all files are whole; else the default."""
    quotients = {size / blocks for size, blocks in sizes}
    if len(quotients) == 1 and (quotient := quotients.pop()) >= 2 and quotient == int(quotient):
        return int(quotient)
    return DEFAULT_BLOCK_SIZE
