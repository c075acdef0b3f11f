"""Files that are either whole or absent: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
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
    """Errors of the system inside say which file they are about: those of `write` and `fsync` do not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Writes `content` to `path` so that a crash leaves the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")  # always the same: the next write takes away what a crash has left
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
    """Writes `value` as indented JSON, atomically; NaN and infinity are refused by name."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads strict JSON: duplicate keys, NaN and infinity, bad UTF-8 and too deep nesting are `UserError`s."""
    path = Path(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        if twice:
            raise UserError(f"{path}: the key {twice[0]!r} stands twice in one object", remedy="keep one of them")
        return dict(pairs)

    def no_constant(name: str) -> float:
        raise UserError(f"{path}: {name} is not a finite JSON number", remedy="write a finite number or null")

    def finite(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else no_constant(digits)  # 1e999 is infinity to Python

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file", remedy="check the path") from None
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


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
