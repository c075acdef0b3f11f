"""Checkpoints that are whole or absent.

All ranks write into `tmp-<step>/`; every file is flushed to the disk; the ranks agree that all went well; rank 0 writes
a manifest (size and SHA-256 of every file), renames the folder to `step-<n>/` and points `latest` at it. A start takes
the newest checkpoint whose manifest holds, verified before anything in it is unpickled; if there are checkpoints and
none is valid, that is an error and never a silent fresh start.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cook.base import distributed
from cook.base.errors import UserError
from cook.base.files import fsync_folder, read_json, sha256, write_atomically, write_json
from cook.base.seeds import restore_rng_state, rng_state
from cook.base.tensor_files import load_pt
from cook.masks.gates import Gates
from cook.training.engine import Engine

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a stage has come; the data order follows from the step."""

    step: int
    tokens: int


def save_checkpoint(
    root: Path, engine: Engine, gates: Gates | None, position: Position, *, fingerprint: str, keep: int
) -> Path:
    """Writes checkpoint `step-<n>` under `root`; all ranks call it together.

    Args:
        root: The stage's `checkpoints` folder.
        engine: Weights and optimizer states.
        gates: The masks being learned, if any.
        position: The steps and tokens done.
        fingerprint: Hash of the settings that the run depends on.
        keep: How many of the newest checkpoints stay.

    Raises:
        UserError: on every rank, if any rank could not write; older checkpoints are untouched.
    """
    scratch, final = root / f"tmp-{position.step}", root / f"step-{position.step}"
    if distributed.rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    distributed.barrier()
    error = _attempt(lambda: _write_shards(scratch, engine, gates))
    failures = [e for e in distributed.gather(error) if e]
    if not failures and distributed.rank() == 0:
        failures = [e for e in [_attempt(lambda: _publish(scratch, final, position, fingerprint))] if e]
    failures = distributed.broadcast(failures)
    if failures:
        if distributed.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {position.step} could not be written to {root}",
            got=failures[0],
            remedy="free some space or mend the folder, then start again: the older checkpoints are intact",
        )
    if distributed.rank() == 0:
        _remove_old(root, keep)
    distributed.barrier()
    return final


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        return f"rank {distributed.rank()}: {error}"
    return None


def _write_shards(scratch: Path, engine: Engine, gates: Gates | None) -> None:
    engine.save(scratch)
    rank = distributed.rank()
    torch.save(rng_state(), scratch / f"rng-{rank}.pt")
    if rank == 0:
        write_json(scratch / "config.json", engine.model_config())
        if gates:
            torch.save(gates.state_dict(), scratch / "gates.pt")


def _publish(scratch: Path, final: Path, position: Position, fingerprint: str) -> None:
    files = sorted(path for path in scratch.rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    manifest = {
        "step": position.step,
        "tokens": position.tokens,
        "world_size": distributed.world_size(),
        "fingerprint": fingerprint,
        "files": {str(p.relative_to(scratch)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files},
    }
    write_json(scratch / MANIFEST, manifest)
    for folder in {path.parent for path in files}:
        fsync_folder(folder)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(scratch, final)
    fsync_folder(final.parent)
    write_atomically(final.parent / "latest", final.name + "\n")


def _remove_old(root: Path, keep: int) -> None:
    for _, folder in sorted(_numbered(root), reverse=True)[max(1, keep) :]:
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        doomed = folder.rename(root / f"tmp-removed-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)


def _numbered(root: Path) -> list[tuple[int, Path]]:
    found = [(path.name.removeprefix("step-"), path) for path in root.glob("step-*") if path.is_dir()]
    return [(int(number), path) for number, path in found if number.isdecimal()]


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after every file has been compared with it.

    Raises:
        UserError: a file is missing, of another size or another content.
    """
    manifest = read_json(folder / MANIFEST)
    try:
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        assert isinstance(manifest["step"], int)
    except (KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(f"{folder / MANIFEST}: not a checkpoint's manifest") from None
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing from the checkpoint")
        if path.stat().st_size != size or sha256(path) != digest:
            raise UserError(f"{path}: not what was saved", wanted=f"{size} bytes, sha256 {digest}")
    return manifest


def newest_valid(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint under `root` that verifies, with its manifest; None if there is none at all.

    Raises:
        UserError: there are checkpoints, but none is valid.
    """
    problems = []
    for _, folder in sorted(_numbered(root), reverse=True):
        try:
            return folder, verify(folder)
        except UserError as error:
            problems.append(error.what)
    if problems:
        raise UserError(
            f"{root}: no checkpoint is valid",
            got="; ".join(problems),
            remedy="restore a good copy, or start over with --resume never",
        )
    return None


def find_checkpoint(root: Path, resume: str) -> tuple[Path, dict[str, Any]] | None:
    """What `--resume` asks for, agreed among the ranks: `auto`, `never`, or a checkpoint's folder."""

    def look() -> tuple[Path, dict[str, Any]] | UserError | None:
        try:
            if resume == "auto":
                return newest_valid(root)
            return None if resume == "never" else (Path(resume), verify(Path(resume)))
        except UserError as error:
            return error

    found = distributed.broadcast(look() if distributed.rank() == 0 else None)
    if isinstance(found, UserError):
        raise found
    return found


def load_checkpoint(
    folder: Path, manifest: dict[str, Any], engine: Engine, gates: Gates | None, *, fingerprint: str
) -> Position:
    """Restores engine, gates and generators from a verified checkpoint; all ranks call it together.

    Raises:
        UserError: it was saved under other settings or by another number of ranks.
    """
    if manifest["fingerprint"] != fingerprint:
        raise UserError(
            f"{folder}: saved by a run with other settings",
            remedy="restore the settings, choose another output_dir, or start over with --resume never",
        )
    if manifest["world_size"] != distributed.world_size():
        raise UserError(
            f"{folder}: saved by another number of ranks",
            wanted=f"{manifest['world_size']} ranks",
            got=distributed.world_size(),
            remedy="start with that many, or --resume never",
        )
    engine.load(folder)
    if gates:
        gates.load_state_dict(load_pt(folder / "gates.pt"))
    restore_rng_state(load_pt(folder / f"rng-{distributed.rank()}.pt"))
    return Position(step=manifest["step"], tokens=manifest["tokens"])
