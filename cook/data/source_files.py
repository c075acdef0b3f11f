"""The files of a corpus: which ones some paths name, how their bytes are read, and the documents that they hold."""

from __future__ import annotations

import bz2
import fnmatch
import glob
import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cook.base.errors import UserError
from cook.data.reports import LeftOut

ENDS_BYTES = 1 << 16
MAX_LINE_BYTES = 16 << 20
"""A longer line is refused: parsed and tokenised, it takes many times its size in memory."""


@dataclass(frozen=True)
class Document:
    """One text, and a name that is the same on every machine that has the corpus."""

    name: str
    text: str


class Item(NamedTuple):
    """An object of a corpus: its document's name, its place for messages, its keys and values."""

    name: str
    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when the corpus was opened; `name` is relative to the path that the user gave."""

    path: Path
    name: str
    size: int
    sha256: str


def _open_zst(path: Path, mode: str) -> Any:
    # Imported late: the library takes long to load, and the standard library has no such reader yet.
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


READERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
"""How compressed files are read, by the ending of their names."""


def is_compressed(path: Path | str) -> bool:
    """Whether a file's name says that it is compressed."""
    return str(path).lower().endswith(tuple(READERS))


def has_ending(name: str, suffixes: tuple[str, ...], *, compressed: bool = True) -> bool:
    """Whether a name, without the ending of a compression, ends in one of some endings, in upper or lower case."""
    name = name.lower()
    if compressed and is_compressed(name):
        name = name.rpartition(".")[0]
    return name.endswith(suffixes)


@contextmanager
def opened(path: Path | str) -> Iterator[BinaryIO]:
    """A file's content, uncompressed. UserError: it cannot be read to its end."""
    reader = READERS.get(Path(path).suffix.lower(), open)
    try:
        with reader(Path(path), "rb") as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}", remedy="copy the file again") from None


def lines_of(stream: BinaryIO, path: Path | str, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Lines and the offsets at which they begin; only a line feed ends a line.

    Raises:
        UserError: One is longer than `MAX_LINE_BYTES`.
    """
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"{path}: the line that begins at offset {offset} is too long",
                wanted=f"at most {MAX_LINE_BYTES >> 20} MB per line",
                remedy="cut the document into several lines; if the file is plain text, read it as such",
            )
        yield offset, line
        offset += len(line)


def hash_of_ends(path: Path) -> str:
    """Hex SHA-256 of a file's size, first and last 64 KiB: enough to tell that it was replaced or grew."""
    with open(path, "rb") as file:
        size, first = os.fstat(file.fileno()).st_size, file.read(ENDS_BYTES)
        file.seek(max(0, size - ENDS_BYTES))
        return hashlib.sha256(b"%d %b %b" % (size, first, file.read())).hexdigest()


def list_files(
    paths: Sequence[str],
    suffixes: tuple[str, ...] | None,
    digest: Callable[[Path], str],
    left_out: LeftOut,
    *,
    compressed: bool = True,
) -> tuple[SourceFile, ...]:
    """Every file that the paths name, in their order and sorted inside each, none twice.

    Args:
        paths: Files, folders or glob patterns.
        suffixes: Endings of the files that are read in a folder. None: any.
        digest: The hash of a file's content.
        left_out: Counts the files that are not read.
        compressed: Whether compressed files are read as well.

    Raises:
        UserError: A path matches no file, or a file cannot be read.
    """
    found: dict[Path, SourceFile] = {}
    for given in paths:
        for path, name in matching_files(given, suffixes, left_out, compressed=compressed):
            if (resolved := path.resolve()) in found:
                continue
            try:
                found[resolved] = SourceFile(path, name, path.stat().st_size, digest(path))
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None
            left_out.add("empty files", not found[resolved].size, name)
    if not found:
        raise UserError("the corpus is empty", wanted="at least one file in data.paths")
    return tuple(found.values())


def matching_files(
    given: str, suffixes: tuple[str, ...] | None, left_out: LeftOut, *, compressed: bool = True
) -> list[tuple[Path, str]]:
    """The files that one path names, each with its name in the corpus, sorted; arguments as for `list_files`."""
    path = Path(given)
    passed = LeftOut()
    if path.is_file():
        return [(path, path.name)]
    if path.is_dir():
        root, found = path, list(_files_below(path, passed))
        if suffixes is not None:
            other = sorted(file for file in found if not has_ending(file.name, suffixes, compressed=compressed))
            passed.add(f"files with another ending than {', '.join(suffixes)}", len(other), *_names(other, root))
            found = sorted(set(found) - set(other))
    elif glob.has_magic(given):
        fixed = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
        root, found = Path(*path.parts[:fixed]), _matches_of(path, fixed, passed)
    elif path.exists():
        raise UserError(
            f"{given}: neither a file nor a folder", wanted="a regular file", got="a pipe, a socket or a device"
        )
    else:
        raise UserError(f"{given}: there is no such file or folder", remedy="check data.paths")
    left_out.include(passed.record())
    if not found:
        wanted = f"files ending in {', '.join(suffixes)}" if suffixes else None
        raise UserError(f"{given}: matches no file", wanted=wanted, got=str(passed) or None)
    return sorted(zip(found, _names(found, root), strict=True), key=lambda item: item[1])


def _names(files: Sequence[Path], root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in files]


def _files_below(root: Path, left_out: LeftOut) -> Iterator[Path]:
    """Every visible regular file below a folder; a folder that links lead to more than once is read once."""

    def unreadable(error: OSError) -> None:
        left_out.add("folders that cannot be read", 1, str(error.filename))

    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in sorted(names + subfolders):
            if name.startswith("."):
                left_out.add("hidden files and folders", 1, Path(folder, name).relative_to(root).as_posix())
        # Sorted, because which of two links to one folder names its files must not depend on the machine.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from _regular([Path(folder, name) for name in sorted(names) if not name.startswith(".")], root, left_out)


def _regular(files: Sequence[Path], root: Path, left_out: LeftOut) -> Iterator[Path]:
    for file in files:
        if file.is_file():
            yield file
        else:
            what = "folders that a pattern matches" if file.is_dir() else "pipes, devices and broken links"
            left_out.add(what, 1, file.relative_to(root).as_posix())


def _matches_of(path: Path, fixed: int, left_out: LeftOut) -> list[Path]:
    """The visible regular files that a pattern matches, whose first `fixed` parts are plain."""
    root, pattern = Path(*path.parts[:fixed]), path.parts[fixed:]
    if "**" in pattern:  # glob.glob would follow links in circles
        below = _files_below(root, LeftOut()) if root.is_dir() else ()
        return [file for file in below if _fits(file.relative_to(root).parts, pattern)]
    return list(_regular(sorted(map(Path, glob.glob(str(path)))), root, left_out))


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        last = len(pattern) == 1
        return last or any(_fits(parts[begin:], pattern[1:]) for begin in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
