"""Atomic file writes, strict JSON reading, and content hashes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cook.base.errors import UserError


def fsync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds the file's path to an `OSError` raised inside. Errors of `write` and `fsync` do not name the file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Writes `content` to `path`. A crash leaves the old file or the new one, never a partial file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")  # a fixed name: the next write replaces what a crash has left
    try:
        with naming(path), open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity raise a `ValueError`."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a file of strict JSON.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or contains duplicate keys, NaN, infinity or too deep nesting.
    """
    path = regular_file(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        if twice:
            raise UserError(f"{path}: the key {twice[0]!r} appears twice in one object", remedy="keep one of them")
        return dict(pairs)

    def no_constant(name: str) -> float:
        raise UserError(f"{path}: {name} is not a finite JSON number", remedy="write a finite number or null")

    def finite(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else no_constant(digits)  # Python reads 1e999 as infinity

    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}", remedy="save the file as UTF-8") from None
    except ValueError as error:  # Python's limit on the digits of an integer
        raise UserError(f"{path}: not a usable number: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be a configuration") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def regular_file(path: str | Path, what: str = "file") -> Path:
    """Raises a UserError unless the path is a readable regular file: reading a pipe or a device might never end."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            open(path, "rb").close()  # it may be another user's
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: there is no such {what}", remedy="check the path") from None
    except (OSError, ValueError) as error:  # a name with a NUL
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        got = kinds.get(stat.S_IFMT(mode), "a device")
        raise UserError(f"{path}: cannot be read: not a regular file", wanted=f"a {what}", got=got)
    return path


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


WHOLE_BYTES = 1 << 30  # `content_hash` reads only this many bytes of a larger file, in evenly spaced blocks of 1 MiB


def content_hash(path: str | Path) -> str:
    """A SHA-256 that shows whether a model's file has been replaced, as a hexadecimal string.

    A file larger than `WHOLE_BYTES` is sampled, so that hundreds of gigabytes take seconds. The hash is cached until
    the file's inode, size or times change.
    """
    seen = os.stat(path)
    return _content_hash(str(path), seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _content_hash(path: str, _device: int, _inode: int, size: int, *_times: int) -> str:
    if size <= WHOLE_BYTES:
        return sha256(path)
    digest, block = hashlib.sha256(str(size).encode()), 1 << 20
    blocks = WHOLE_BYTES // block
    with open(path, "rb") as file:
        for number in range(blocks):
            file.seek((size - block) * number // (blocks - 1))  # from the first byte to the last
            digest.update(file.read(block))
    return digest.hexdigest()
