"""The sizes of a stage: the masks that each step trains, and the held-out loss of each size."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cook.base.distributed import say
from cook.base.seeds import derived_seed
from cook.data.rows import Rows
from cook.pruning.attach import AttachedGates
from cook.pruning.gates import Gates, size_of_step
from cook.recipe.inputs import Inputs
from cook.recipe.plan import Stage
from cook.recipe.stage_data import loss_of_rows
from cook.training.engine import Engine


class TrainedSizes:
    """The masks of each size of a stage; without several sizes, of its one model.

    Args:
        stage: The plan.
        inputs: The stage's inputs.
        attached: The hooks that apply the masks.
        gates: The masks that are learned; None if none are.
        device: The device of the model.
    """

    def __init__(
        self, stage: Stage, inputs: Inputs, attached: AttachedGates, gates: Gates | None, device: torch.device
    ):
        self._stage, self._attached, self._gates, self._device = stage, attached, gates, device
        self._seed = derived_seed(stage.config.seed, stage.name)
        self._fixed = [{name: mask.to(device) for name, mask in masks.items()} for masks in inputs.nested]

    def before_step(self, step: int) -> None:
        """Applies the fixed masks of the size that this step trains; learned ones are drawn in the step itself."""
        if self._fixed:
            self._attached.set(self._fixed[size_of_step(step, len(self._fixed), self._seed)])

    def largest(self) -> Mapping[str, torch.Tensor]:
        """The present gates of the largest size."""
        return self._gates.split(self._gates.largest().to(self._device)) if self._gates else self._fixed[0]

    def held_out_losses(self, engine: Engine, rows: Rows) -> list[float | None]:
        """The held-out loss of each size with binary masks; those of the smallest stay attached. All ranks call it.

        Returns:
            One loss per size, in nats per token. None if the stage measures none.
        """
        losses: list[float | None] = []
        engine.module.eval()
        for number, name in enumerate([f", {size:g}" for size in self._stage.sizes] or [""]):
            self._attached.set(self._binary(number))
            losses.append(stage_loss(self._stage, engine, rows))
            if losses[-1] is not None:
                say(f"{self._stage.name}{name}: held-out loss {losses[-1]:.4f}")
        return losses

    def _binary(self, number: int) -> Mapping[str, torch.Tensor]:
        if self._fixed:
            return self._fixed[number]
        masks = self._gates.binary(number) if self._gates else {}
        return {name: mask.to(self._device) for name, mask in masks.items()}


def stage_loss(stage: Stage, engine: Engine, rows: Rows) -> float | None:
    """The loss of a model in eval mode on `training.eval_rows` of the held-out rows; None if that is 0."""
    number = stage.config.training.eval_rows
    return loss_of_rows(stage, engine, rows, number) if number else None
