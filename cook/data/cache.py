"""Cached folders, which are complete or absent, and are rebuilt if their inputs have changed.

A folder's manifest lists the size of every file, the fingerprint of the inputs and a few facts. One builder at a time
works in a cache; the next one removes the unfinished folder of a killed builder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cook.base.errors import UserError
from cook.base.files import fsync_folder, naming, read_json, write_json

MANIFEST = "manifest.json"


def fingerprint_of(*parts: Any) -> str:
    """Hex SHA-256 of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole folder; None if it is missing, or a file is missing or has another size."""
    try:
        manifest = read_json(folder / MANIFEST)
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (UserError, OSError, KeyError, TypeError):
        return None
    return manifest if sizes == manifest["files"] else None


def whole_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; a `UserError` if the folder is missing or damaged."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: prepared data is missing or damaged", remedy="start again, it is rebuilt then")
    return manifest


def mapped(path: Path, dtype: Any) -> np.ndarray:
    """A file's numbers, mapped. A plain array, because numpy's class of mapped ones is slow at every access."""
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.zeros(0, dtype)


def cached_folder(cache: Path, kind: str, fingerprint: str, build: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder `<cache>/<kind>-<fingerprint>`, built if it is missing or not whole.

    Args:
        cache: Made if missing.
        kind: First part of the folder's name.
        fingerprint: Of everything that the content depends on.
        build: Writes files into a given folder; returns facts for the manifest.

    Raises:
        UserError: The cache cannot be written here.
        OSError: The disk is full or broken, naming the file.
    """
    folder = cache / f"{kind}-{fingerprint[:16]}"
    if _is_current(folder, fingerprint):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Another run may have built it while this one waited.
            if not _is_current(folder, fingerprint):
                _build(folder, fingerprint, build)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE):
            raise  # not a mistake in the settings; the same command prepares what is missing
        raise UserError(
            f"{cache}: the cache of prepared data cannot be written: {error.strerror}",
            remedy="free some space, or name another folder in data.cache_dir",
        ) from error
    return folder


def _is_current(folder: Path, fingerprint: str) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and manifest.get("fingerprint") == fingerprint


def _build(folder: Path, fingerprint: str, build: Callable[[Path], dict[str, Any]]) -> None:
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with naming(folder):
            facts = build(aside)
        names = sorted(path.name for path in aside.iterdir())
        for name in names:
            with naming(folder / name), open(aside / name, "rb") as file:
                os.fsync(file.fileno())
        files = {name: (aside / name).stat().st_size for name in names}
        write_json(aside / MANIFEST, {"fingerprint": fingerprint, **facts, "files": files})
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(aside, folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
