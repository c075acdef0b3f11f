"""Model folders that appear whole or not at all: written beside their place, checked there, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cook.base.errors import RunFailed, UserError
from cook.base.files import fsync_folder


@contextmanager
def published(output: Path, *, source: Path) -> Iterator[Path]:
    """A folder to write a model into, which takes the place of `output` when the block ends without an error.

    After an error nothing of it is left, and an earlier export at `output` is as it was.

    Args:
        output: Where the model goes. Of a link to a folder, the folder is replaced and the link stays.
        source: The model that is read, which must not be replaced.

    Raises:
        UserError: something at `output` that is no earlier export.
        RunFailed: a file cannot be written or read, inside the block too.
    """
    target = _target(output, source)
    aside, old = (target.with_name(f".{target.name}.{end}") for end in ("tmp", "old"))
    try:
        if old.exists() and not target.exists():  # an earlier run was killed between its two renames
            old.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        _flush(aside)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        fsync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise RunFailed(
            f"{output}: the model cannot be written: {_reason(error)}\n"
            f"  Nothing of it is left. {source}, the masks and any earlier export are as they were.\n"
            "  remedy: make room or mend the disk, then run the same command again"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _target(output: Path, source: Path) -> Path:
    try:
        target = output.resolve()
        beneath = (source.resolve(), *source.resolve().parents)
    except (OSError, RuntimeError):  # links in a circle
        raise UserError(f"{output}: a link that leads nowhere", remedy="choose another --output") from None
    if target in beneath:
        raise UserError(f"{output}: would overwrite the model it is made from", remedy="choose another --output")
    if target.exists() and not target.is_dir():
        raise UserError(f"{output}: is a file", remedy="choose another --output")
    if target.is_mount():
        raise UserError(f"{output}: is a mount point, which cannot be replaced", remedy=f"--output {output}/model")
    if target.exists() and not (target / "config.json").exists() and any(target.iterdir()):
        raise UserError(f"{output}: holds something other than a model", remedy="choose another --output")
    return target


def _flush(folder: Path) -> None:
    """Brings every file to the disk: some systems report a full disk or a quota only then."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(parent))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
