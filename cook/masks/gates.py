"""The learned masks of one stage: their logα, the noise of a step, the target's rise, the final 0/1 decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cook.base.seeds import generator
from cook.masks.controller import Constraint, GateController, ramp
from cook.masks.hard_concrete import sample, uniform_noise


def automatic_learning_rate(steps: int) -> float:
    """Far enough in a third of the stage to close an open gate, within the range that trains well."""
    return min(1.0, max(0.05, 30.0 / steps))


class Gates:
    """Gates of a list of groups, the same on every rank.

    They live beside the engine: replicated, in fp32 on the CPU, with their own optimizer. A step draws z with
    `draw`, lets the forward use it (a plain tensor that requires grad), and hands ∂L/∂z to `update`.

    Args:
        sizes: Units of every group by name, in the order of the flat vector.
        constraints: They cover the flat vector.
        steps: Length of the stage.
        seed: Of the noise.
        learning_rate: None for `automatic_learning_rate`.
        initial_log_alpha: Where all gates start, but for a jitter of 0.01 against ties.
        ramp_fraction: The part of `steps` in which the targets rise.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        constraints: Sequence[Constraint],
        *,
        steps: int,
        seed: int,
        learning_rate: float | None = None,
        initial_log_alpha: float = 3.0,
        ramp_fraction: float = 0.6,
    ):
        self.sizes, self.steps, self.seed, self.ramp_fraction = dict(sizes), steps, seed, ramp_fraction
        count = sum(self.sizes.values())
        jitter = 0.01 * torch.randn(count, generator=generator(seed, "gates", "start"))
        self.log_alpha = initial_log_alpha + jitter
        rate = automatic_learning_rate(steps) if learning_rate is None else learning_rate
        self.controller = GateController(constraints, learning_rate=rate)
        self._start_sparsity = self.expected_sparsity()
        self._leaf: torch.Tensor | None = None
        self._drawn: torch.Tensor | None = None

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        return self.controller.constraints

    def draw(self, step: int) -> torch.Tensor:
        """z of step `step`, float32 `[gates]`: the same on every rank, and the same again after a resume."""
        noise = uniform_noise(len(self.log_alpha), generator(self.seed, "gates", step))
        self._leaf = self.log_alpha.clone().requires_grad_()
        self._drawn = sample(self._leaf, noise)
        return self._drawn.detach()

    def split(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat vector as one tensor a group, differentiably."""
        return dict(zip(self.sizes, z.split(list(self.sizes.values())), strict=True))

    def update(self, z_gradient: torch.Tensor, step: int) -> None:
        """Moves the gates by ∂L/∂z of the z last drawn, averaged over ranks and micro-batches; `step` counts from 1."""
        assert self._drawn is not None and self._leaf is not None, "update without draw"
        self._drawn.backward(z_gradient.to(self._drawn))
        assert self._leaf.grad is not None
        self.controller.step(self.log_alpha, self._leaf.grad, self.targets(step))
        self._drawn = self._leaf = None

    def targets(self, step: int) -> torch.Tensor:
        """The sparsity wanted after step `step`, float64 `[constraints]`."""
        pairs = zip(self._start_sparsity.tolist(), self.constraints, strict=True)
        values = [ramp(step, self.steps, self.ramp_fraction, start, c.target) for start, c in pairs]
        return torch.tensor(values, dtype=torch.float64)

    def expected_sparsity(self) -> torch.Tensor:
        """s of every constraint, float64 `[constraints]`."""
        return self.controller.expected_sparsity(self.log_alpha)

    def binary(self) -> dict[str, torch.Tensor]:
        """The masks: the gates of least logα go, as many a constraint as bring its removed share nearest the target.

        A per-block constraint on heads or dims so ends with exactly its number; a constraint on blocks within half a
        block's parameters.
        """
        kept = torch.ones_like(self.log_alpha)
        for c in self.constraints:
            costs = torch.tensor(c.costs, dtype=torch.float64)
            order = torch.argsort(self.log_alpha[c.start : c.start + len(costs)], stable=True)
            removed_share = torch.cat([torch.zeros(1, dtype=torch.float64), costs[order].cumsum(0)])
            removed = int((removed_share - c.target).abs().argmin())
            kept[c.start + order[:removed]] = 0.0
        return self.split(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"log_alpha": self.log_alpha.clone(), **self.controller.state_dict()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        assert state["log_alpha"].shape == self.log_alpha.shape, "the state of other gates"
        self.log_alpha = state["log_alpha"].clone()
        self.controller.load_state_dict(state)
