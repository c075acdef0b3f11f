"""The optimizer's state that a stage takes over from the stage before.

Without it every stage begins with Adam's moments at zero, and the first steps of each undo part of what was learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from cook.base.tensor_files import LazyTensors
from cook.pruning.mask_file import read_masks
from cook.pruning.reshape import filled_up, reshaped
from cook.pruning.units import PruningSpace
from cook.recipe.inputs import Inputs
from cook.recipe.plan import Stage, plan_stage
from cook.training.checkpoint import find_checkpoint
from cook.training.engine import Engine
from cook.training.shards import Shards

AFRESH = ("pattern", "moefy")
"""Stages with a new optimizer: weights that a pattern removes would move by moments, and experts are new weights."""


def carry_optimizer(stage: Stage, whole: Inputs, trained: Inputs, engine: Engine) -> str | None:
    """Loads the moments and the step count with which the stage before ended; all ranks call it.

    Weights that the stage before did not train have moments of zero. Units that are removed by now lose theirs.

    Args:
        stage: The plan.
        whole: The stage's inputs with all units.
        trained: The inputs that it trains, maybe without the masked units.
        engine: The engine, before its first step.

    Returns:
        A sentence that says whether there was a state to load; None if the stage wants none.
    """
    training, before = stage.config.training, stage.after
    if before is None or stage.name in AFRESH or not (training.carry_optimizer and training.train_weights):
        return None
    earlier = plan_stage(stage.config, before)
    found = find_checkpoint(earlier.folder / "checkpoints", "auto")
    if found is None:
        return f"{before} left no checkpoint: the optimizer starts from zero"
    folder, manifest = found
    if manifest["layout"]["optimizer"] != engine.layout["optimizer"]:
        return f"{before} had another optimizer: this one starts from zero"
    shards = Shards(folder)
    moments = shards.moments()
    if all(len(tensors) < 2 for tensors in moments.values()):  # with fixed weights the optimizer still has one
        return f"{before} trained no weights: the optimizer starts from zero"
    masks = _fixed_masks(earlier, whole.space)
    space, removed = whole.space, whole.fixed if trained is not whole else {}
    orders = {key: 2 if key.endswith("_sq") else 1 for key in moments}  # Adam's exp_avg_sq is of squared gradients
    complete = {key: _complete(tensors, space, masks, orders[key]) for key, tensors in moments.items()}
    wanted = {key: reshaped(tensors, space, removed, moment=orders[key]) for key, tensors in complete.items()}
    engine.load_moments(wanted, shards.counters())
    return f"the optimizer resumes from {before}"


def _fixed_masks(stage: Stage, space: PruningSpace) -> Mapping[str, torch.Tensor]:
    """The masks under which a stage trained; of several sizes those of the largest, whose units it held."""
    if stage.is_moefy:  # it has removed what they mask
        return {}
    return read_masks(space, **stage.by_size(stage.fixed)[0].by_option)


def _complete(
    found: Mapping[str, torch.Tensor], space: PruningSpace, masks: Mapping[str, torch.Tensor], moment: int
) -> LazyTensors:
    """A moment for every weight of the whole model, 0 where there was none."""
    filled = filled_up(found, space, masks, moment=moment)  # only where a shape is that of the smaller model

    def read(path: str) -> torch.Tensor:
        if path not in filled:
            return torch.zeros(space.shapes[path])
        tensor = found[path] if path in found else None
        return tensor if tensor is not None and tensor.shape == space.shapes[path] else filled[path]

    return LazyTensors({path: partial(read, path) for path in space.shapes})
