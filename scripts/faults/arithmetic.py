"""Losses and gradients that are not finite, or far too large, on one rank; and what a checkpoint must not lack."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from proof import OPTIONS, STAGE, STEPS, Scene, Trial, outcome
from ranks import run

from cook.base.files import sha256
from cook.training.manifest import seal
from tests.recipe.tiny_run import read_log

BAD_STEP = 6
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the logits and the loss to the spoilt loss."""


def nan_loss(_logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def inf_gradient(logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    large = logits.sum() * 1e20
    return loss + (large - large.detach()) * 1e30  # nothing is added to the loss; the gradient is beyond fp32


def large_gradient(_logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    return loss * 1e6 - (loss * 1e6).detach() + loss.detach()


def spoiling(spoil: Loss, bad_rank: int) -> Callable[[int], None]:
    """What a child does before it starts: on one rank the loss of one step is spoilt."""

    def before(rank: int) -> None:
        if rank != bad_rank:
            return
        real, calls = F.cross_entropy, itertools.count(1)

        def cross_entropy(logits: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            loss = real(logits, *arguments, **keywords)
            return spoil(logits, loss) if next(calls) == BAD_STEP else loss

        F.cross_entropy = cross_entropy

    return before


def not_finite(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """fp32 and bf16, ZeRO 1 to 3: the step is left out on all ranks alike, whichever rank was hit."""
    cases = list(itertools.product(("fp32", "bf16"), (1, 2, 3), (nan_loss, inf_gradient)))
    for precision, zero, spoil in cases if trials >= len(cases) else random.sample(cases, trials):
        changes = (f"training.precision={precision}", f"deepspeed.zero_optimization.stage={zero}")
        options = (*OPTIONS, *(part for change in changes for part in ("--set", change)))
        outcomes, problem = [], None
        for bad_rank in (1, 0):
            scene.fresh()
            ended = run(scene.run, options, before=spoiling(spoil, bad_rank))
            if set(ended.codes) != {0} or f"step {BAD_STEP}" not in ended.out:
                problem = f"not left out, or not told: {ended}"
                break
            came = outcome(scene.run)
            outcomes.append([came["weights"], came["mask"], came["checkpoint"]])
        if problem is None and outcomes[0] != outcomes[1]:
            problem = "it matters which rank was hit: some rank has applied a part of the step"
        note = f"{spoil.__name__}, {precision}, ZeRO {zero}"
        yield Trial(survived=problem is None, note=f"{note}: {problem}" if problem else note)


def huge_gradient(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """One rank's gradient a million times too large: the run ends, with a loss like that of the untouched one."""
    for number in range(trials):
        scene.fresh()
        ended = run(scene.run, OPTIONS, before=spoiling(large_gradient, 1 - number % 2))
        losses = [r["loss"] for r in read_log(scene.run, STAGE) if "loss" in r]
        reference = [r["loss"] for r in scene.outcomes[2]["log"] if "loss" in r]
        right = set(ended.codes) == {0} and len(losses) == STEPS and all(map(math.isfinite, losses))
        near = right and abs(losses[-1] - reference[-1]) < 0.1 * reference[-1]
        yield Trial(survived=near, note=f"last loss {losses[-1:]} against {reference[-1]}\n{ended if not near else ''}")


def controls(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """The proof itself: a checkpoint that lacks the gates' moments, a generator, or the optimizer's must be noticed."""
    for name in list(LEFT_OUT)[:trials]:
        scene.fresh("stopped")
        newest = scene.checkpoints / "step-8"
        for path in sorted(newest.rglob("*.pt")):
            with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
                content = torch.load(path, weights_only=True)
            if LEFT_OUT[name](path, content):
                torch.save(content, path)
                _sign(newest, path)
        ended = run(scene.run, OPTIONS)
        resumed = set(ended.codes) == {0} and "resuming from step 8" in ended.out
        noticed = resumed and outcome(scene.run) != scene.outcomes[2]
        yield Trial(survived=noticed, note=f"{name} left out: {'noticed' if noticed else ended}")


def _moments(path: Path, content: Any) -> bool:
    if path.name != "gates.pt":
        return False
    for key in ("moment", "second_moment"):
        content[key].zero_()
    return True


def _generator(path: Path, content: Any) -> bool:
    if path.name != "rng-1.pt":
        return False
    content["cpu"] = torch.Generator().manual_seed(0).get_state()
    return True


def _optimizer(path: Path, content: Any) -> bool:
    return path.name.endswith("optim_states.pt") and path.name.startswith("zero_pp_rank_1") and _zeroed(content)


def _zeroed(content: Any) -> bool:
    """Sets Adam's moments to zero wherever they are."""
    found = False
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        if key in ("exp_avg", "exp_avg_sq") and isinstance(value, torch.Tensor):
            value.zero_()
            found = True
        else:
            found |= _zeroed(value)
    return found


LEFT_OUT: dict[str, Callable[[Path, Any], bool]] = {
    "gates' moments": _moments,
    "generator of rank 1": _generator,
    "Adam's moments on rank 1": _optimizer,
}


def _sign(folder: Path, changed: Path) -> None:
    """Makes the manifest say that a changed file is as it was saved."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][str(changed.relative_to(folder))] = {"size": changed.stat().st_size, "sha256": sha256(changed)}
    path.write_text(json.dumps(seal(manifest)))
