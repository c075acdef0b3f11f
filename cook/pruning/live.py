"""Learned gates in any training loop: two calls around the forward and backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cook.base import distributed
from cook.base.errors import UserError
from cook.pruning.attach import AttachedGates, by_feature
from cook.pruning.gates import MEAN, Gates, own_share
from cook.pruning.mask_set import consistent
from cook.pruning.units import PruningSpace, UnitGroup


class LiveGates:
    """Gates that are learned on a live model.

    ```python
    for batch in batches:
        gates.before_forward()
        model(**batch).loss.backward()
        gates.after_backward()
        optimizer.step()
    ```

    With gradient accumulation, call `before_forward` before each micro-batch and `after_backward` once per optimizer
    step. In a process group, gradients of the gates are averaged over the ranks; every rank must make the same calls.

    Args:
        model: The model; its modules are named as in `space`.
        space: What can be pruned.
        groups: The groups that have gates.
        gates: Their values and budgets.
        means: What takes the place of removed units' features, as `cook.mean_inputs` returns it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        space: PruningSpace,
        groups: Sequence[UnitGroup],
        gates: Gates,
        means: Mapping[str, torch.Tensor] | None = None,
    ):
        self.model, self.space, self.gates, self.step = model, space, gates, 0
        self.attached = AttachedGates(model, groups, {})
        gates.means = {}
        for group in groups:
            if (mean := (means or {}).get(group.name)) is None:
                continue
            shape = by_feature(group.gate, torch.ones(group.size)).shape
            if mean.shape != shape:
                raise UserError(
                    f"means: {group.name}", wanted=f"shape {tuple(shape)}", got=f"shape {tuple(mean.shape)}"
                )
            gates.means[group.name] = mean
        self._compensate()
        self._z: torch.Tensor | None = None

    def _compensate(self) -> None:
        device = next(self.model.parameters()).device
        self.attached.compensate({name: mean.to(device) for name, mean in self.gates.means.items()})

    def before_forward(self) -> None:
        """Sets the gates of this step; the backward pass will compute their gradients."""
        if self._z is None:
            device = next(self.model.parameters()).device
            self._z = self.gates.draw(self.step + 1).to(device).requires_grad_()
        self.attached.set(self.gates.split(self._z))

    def after_backward(self, *, loss_scale: float = 1.0) -> bool:
        """Moves the gates by the gradients accumulated since the last call.

        Args:
            loss_scale: The factor by which the loss was multiplied before the backward pass, as with fp16.

        Returns:
            False if a gradient is not finite on some rank: the gates did not move and the step is not counted.
        """
        assert self._z is not None, "after_backward without before_forward"
        (gradient,) = distributed.summed_on_cpu(own_share(self._z, loss_scale))
        self._z = None
        if not bool(torch.isfinite(gradient).all()):
            return False
        self.step += 1
        self.gates.update(gradient, self.step)
        return True

    @property
    def sparsity(self) -> dict[str, float]:
        """The expected sparsity of each budget, by name."""
        values = self.gates.expected_sparsity().tolist()
        return {c.name: value for c, value in zip(self.gates.constraints, values, strict=True)}

    def masks(self, number: int = 0) -> dict[str, torch.Tensor]:
        """The masks as 0 and 1, float32 `[units]` by group name; of several sizes, those of this number."""
        return consistent(self.space, self.gates.binary(number))

    def hold(self, number: int = 0) -> None:
        """Applies `masks(number)` from now on, for evaluating or finetuning the masked model."""
        device = next(self.model.parameters()).device
        self.attached.set({name: mask.to(device) for name, mask in self.gates.binary(number).items()})

    def remove(self) -> None:
        """Removes the gates from the model, which then computes what it computed before they were attached."""
        self.attached.remove()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state that a resumed run needs."""
        return self.gates.state_dict() | {"live_step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Resumes from `state_dict` of gates with the same budgets.

        Raises:
            UserError: the saved gates learned with other means.
        """
        state = dict(state)
        step = int(state.pop("live_step"))
        saved = {name.removeprefix(MEAN) for name in state if name.startswith(MEAN)}
        if saved != set(self.gates.means):  # the budget counts the biases
            raise UserError(
                "the gates do not have the means of the saved ones",
                wanted=f"means of {len(saved)} groups" if saved else "no means",
                got=f"means of {len(self.gates.means)} groups" if self.gates.means else "no means",
            )
        self.step = step
        self.gates.load_state_dict(state)
        self._compensate()
