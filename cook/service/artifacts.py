"""The manifest of what a finished job offers for download: `run/artifacts.json`."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cook.base.files import write_json

BLOCK = 1 << 24
FOLDERS = ("pruned", "report", "masks", "config")


def write_manifest(folder: Path, breathe: Callable[[], object] = lambda: None) -> list[dict[str, Any]]:
    """Writes the manifest of a job: the pruned model, masks, report, configuration and logs.

    Args:
        folder: The job's folder. Everything listed lies below its `run/out`.
        breathe: Called between blocks, since hashing a large model takes minutes.

    Returns:
        The manifest: name, path relative to `run/`, bytes and SHA-256 of each file.
    """
    run = folder / "run"
    out = run / "out"
    shutil.copytree(folder / "config", out / "config", dirs_exist_ok=True)
    listed = [
        {
            "name": path.relative_to(out).as_posix(),
            "path": path.relative_to(run).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": _sha256(path, breathe),
        }
        for path in _files(out)
    ]
    write_json(run / "artifacts.json", listed)
    return listed


def _files(out: Path) -> Iterator[Path]:
    for name in FOLDERS:
        found = sorted(path for path in (out / name).rglob("*") if path.is_file() and not path.is_symlink())
        yield from (path for path in found if not any(part.startswith(".") for part in path.relative_to(out).parts))
    yield from sorted(path for path in out.glob("*/log.jsonl") if not path.is_symlink())


def _sha256(path: Path, breathe: Callable[[], object]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            breathe()
    return digest.hexdigest()
