"""Checkpoints that are whole or absent.

All ranks write into `tmp-<step>/`; every file is flushed to the disk; the ranks agree that all went well; rank 0 writes
a manifest (size and SHA-256 of every file), renames the folder to `step-<n>/` and points `latest` at it. A start takes
the newest checkpoint whose manifest holds, verified before anything in it is unpickled; if there are checkpoints and
none is valid, that is an error and never a silent fresh start.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cook.base import distributed
from cook.base.errors import RunFailed, UserError
from cook.base.files import fsync_folder, read_json, sha256, write_atomically, write_json
from cook.base.seeds import restore_rng_state, rng_state
from cook.base.tensor_files import load_pt
from cook.masks.gates import Gates
from cook.training.engine import Engine, checkpoint_weights

MANIFEST = "manifest.json"
MANIFEST_TYPES = {"step": int, "tokens": int, "world_size": int, "fingerprint": str, "layout": str, "files": dict}


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a stage has come; the data order follows from the step."""

    step: int
    tokens: int
    data: dict[str, Any] | None = None
    """What the loader needs beside the step to read on, as JSON; only a checkpoint holds it."""


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
        RunFailed: on every rank, if any rank could not write; older checkpoints are untouched.
    """
    scratch, final = root / f"tmp-{position.step}", root / f"step-{position.step}"
    error = _attempt(lambda: _empty_folder(scratch)) if distributed.rank() == 0 else None
    failures = [e for e in [distributed.broadcast(error)] if e]
    if not failures:
        error = _attempt(lambda: _write_shards(scratch, engine, gates))
        failures = [e for e in distributed.gather(error) if e]
    if not failures and distributed.rank() == 0:
        failures = [e for e in [_attempt(lambda: _publish(scratch, final, position, fingerprint, engine.layout))] if e]
    failures = distributed.broadcast(failures)
    if failures:
        if distributed.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        raise RunFailed(
            f"the checkpoint of step {position.step} could not be written to {root}\n  {failures[0]}\n"
            "  remedy: free some space or mend the folder, then start again; the older checkpoints are intact"
        )
    if distributed.rank() == 0:
        _remove_old(root, position.step, keep)
    distributed.barrier()
    return final


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


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


def _publish(scratch: Path, final: Path, position: Position, fingerprint: str, layout: str) -> None:
    files = sorted(path for path in scratch.rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    manifest = {
        "step": position.step,
        "tokens": position.tokens,
        "world_size": distributed.world_size(),
        "fingerprint": fingerprint,
        "layout": layout,
        **({"data": position.data} if position.data else {}),
        "files": {str(p.relative_to(scratch)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files},
    }
    write_json(scratch / MANIFEST, manifest)
    for folder in {path.parent for path in files}:
        fsync_folder(folder)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(scratch, final)
    fsync_folder(final.parent)
    write_atomically(final.parent / "latest", final.name + "\n")


def _remove_old(root: Path, newest: int, keep: int) -> None:
    found = sorted(_numbered(root), reverse=True)
    # Beyond the step just saved lie those of a future that was given up: damaged ones, or more than was gone back to.
    given_up = [entry for entry in found if entry[0] > newest]
    for _, folder in given_up + [entry for entry in found if entry[0] <= newest][max(1, keep) :]:
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
        sound = all(isinstance(manifest[key], kind) for key, kind in MANIFEST_TYPES.items())
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{folder / MANIFEST}: not a checkpoint's manifest")
    strange = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {*expected, MANIFEST}
    if strange:
        # The engine looks its files up by pattern, and executes what it finds.
        raise UserError(f"{folder / min(strange)}: not part of the checkpoint", remedy="move it elsewhere")
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
            manifest = verify(folder)
        except UserError as error:
            problems.append(error.what)
            continue
        for problem in problems:
            print(f"warning: {problem}; going back to {folder.name}", file=sys.stderr, flush=True)
        return folder, manifest
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
    if manifest["layout"] != engine.layout:
        raise UserError(
            f"{folder}: saved in another layout",
            wanted=manifest["layout"],
            got=engine.layout,
            remedy="restore the DeepSpeed config and the precision, or start over with --resume never",
        )
    engine.load(folder)
    if gates:
        gates.load_state_dict(load_pt(folder / "gates.pt"))
    restore_rng_state(load_pt(folder / f"rng-{distributed.rank()}.pt"))
    return Position(step=manifest["step"], tokens=manifest["tokens"], data=manifest.get("data"))


def stored_weights(folder: Path) -> Mapping[str, torch.Tensor]:
    """The fp32 weights in a checkpoint, one of these or one that DeepSpeed alone wrote, at any ZeRO stage.

    Raises:
        UserError: the checkpoint has a manifest and is not what was saved; it is compared before anything is unpickled.
    """
    if (folder / MANIFEST).is_file():
        verify(folder)
    return checkpoint_weights(folder)
