"""Finding and loading checkpoints; `saver.py` writes them.

The ranks agree on the newest valid checkpoint that all of them can read, before any of its files is opened. If
checkpoints exist and none is valid, that is an error and never a silent fresh start.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cook.base import distributed
from cook.base.errors import UserError
from cook.base.faults import point
from cook.base.files import read_json
from cook.base.seeds import derived_seed, restore_rng_state, seed_everything
from cook.base.tensor_files import load_pt
from cook.distill.teacher_loss import Projections
from cook.pruning.gates import Gates
from cook.training.engine import Engine
from cook.training.manifest import MANIFEST, folder_of, no_valid_checkpoint, recover, steps, verify
from cook.training.saver import STATE, Position, attempt
from cook.training.shards import checkpoint_weights


def find_checkpoint(root: Path, resume: str) -> tuple[Path, dict[str, Any]] | None:
    """Finds the checkpoint that `--resume` selects (`auto`, `never`, or a checkpoint's folder); all ranks agree on it.

    Every rank verifies its share of the files, so that together they read each checkpoint once.

    Raises:
        UserError: on every rank, if no checkpoint is valid or the named one is not.
    """
    if resume == "never":
        return None
    if resume != "auto":
        found = _verified_together(Path(resume))
        if isinstance(found, UserError):
            raise found
        return Path(resume), found
    error = attempt(lambda: recover(root)) if distributed.rank() == 0 else None
    error = distributed.broadcast(error)
    if error:
        raise UserError(f"{root}: cannot be cleaned up", got=error, remedy="correct the folder's permissions")
    seen = distributed.gather(steps(root))
    problems = []
    for step in sorted({step for own in seen for step in own}, reverse=True):
        folder = folder_of(root, step)
        blind = [rank for rank, own in enumerate(seen) if step not in own]
        verdict = UserError(f"{folder}: rank {blind[0]} cannot see it") if blind else _verified_together(folder)
        if isinstance(verdict, UserError):
            problems.append(verdict.what)
            continue
        for problem in problems:
            distributed.warn(f"{problem}; using {folder.name} instead")
        point("load.found")
        return folder, verdict
    none = distributed.broadcast(no_valid_checkpoint(root, problems))
    if none:
        raise none
    return None


def _verified_together(folder: Path) -> dict[str, Any] | UserError:
    verdict: dict[str, Any] | UserError
    try:
        verdict = verify(folder, distributed.rank(), distributed.world_size())
    except UserError as error:
        verdict = error
    # The digest covers the rest of the manifest.
    reports = distributed.gather(verdict if isinstance(verdict, UserError) else verdict["digest"])
    if errors := [report for report in reports if isinstance(report, UserError)]:
        return errors[0]
    return verdict if len(set(reports)) == 1 else UserError(f"{folder}: differs between ranks")


def load_checkpoint(
    folder: Path,
    manifest: dict[str, Any],
    engine: Engine,
    gates: Gates | None,
    *,
    fingerprint: str,
    projections: Projections | None = None,
) -> Position:
    """Restores engine, gates and random generators from a verified checkpoint; all ranks call it together.

    With another world size or another ZeRO stage, fp32 weights, moments, schedules and gates are restored exactly,
    and the same batches follow in the same order; random numbers of each rank (dropout) differ.

    Raises:
        UserError: it was saved under other settings.
    """
    if manifest["fingerprint"] != fingerprint:
        raise UserError(
            f"{folder}: saved by a run with other settings, another corpus or other masks",
            remedy="restore them, choose another output_dir, or start over with --resume never",
        )
    for key in ("precision", "optimizer"):
        if manifest["layout"].get(key) != engine.layout[key]:
            raise UserError(
                f"{folder}: saved with another {key}",
                wanted=manifest["layout"].get(key),
                got=engine.layout[key],
                remedy=f"restore the {key}, or start over with --resume never",
            )
    position = _position(folder, manifest["world_size"])
    if manifest["world_size"] == distributed.world_size() and manifest["layout"] == engine.layout:
        engine.load(folder)
    else:
        engine.load_resharded(folder)
    point("load.engine")
    if gates:
        gates.load_state_dict(load_pt(folder / "gates.pt"))
    if projections:
        projections.load_state_dict(load_pt(folder / "projections.pt"))
    if distributed.rank() < manifest["world_size"]:
        restore_rng_state(load_pt(folder / f"rng-{distributed.rank()}.pt"))
    else:
        seed_everything(derived_seed(torch.initial_seed() % 2**63, "resumed at", position.step))
    point("load.done")
    return position


def _position(folder: Path, world_size: int) -> Position:
    state = read_json(folder / STATE)
    ranks = state.pop("ranks")
    state["log"] = tuple(state.get("log", ()))
    if world_size == distributed.world_size():
        return Position(**state, **ranks[distributed.rank()])
    if any(rank != ranks[0] for rank in ranks):
        raise UserError(
            f"{folder}: each rank has its own position in the data",
            wanted=f"{world_size} ranks",
            got=distributed.world_size(),
            remedy="use that many ranks, or --resume never",
        )
    return Position(**state, **ranks[0])


def stored_weights(folder: Path) -> Mapping[str, torch.Tensor]:
    """The fp32 weights in a checkpoint of cook or of DeepSpeed itself, at any ZeRO stage.

    Raises:
        UserError: the checkpoint has a manifest and its files differ from it; nothing is opened before that check.
    """
    if (folder / MANIFEST).is_file():
        verify(folder)
    return checkpoint_weights(folder)
