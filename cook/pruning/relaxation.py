"""What stands for a 0/1 mask while it is learned: a number a unit, between gone and there.

Two relaxations share one controller, which asks of each the same few questions. Values x are what is trained, one a
gate; z ∈ [0, 1] is what multiplies the unit; openness is what a constraint counts.

|               | x             | z                                | openness | binary by the end through          |
|---------------|---------------|----------------------------------|----------|------------------------------------|
| deterministic | z itself      | x                                | x        | a concave term c · z(1 − z)        |
| hard concrete | logα          | a stretched, clamped sample      | P(z ≠ 0) | the noise: a half-open gate costs  |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from cook.base.seeds import generator
from cook.pruning.hard_concrete import probability_open, sample, uniform_noise


class Relaxation(Protocol):
    """The questions; every tensor is `[gates]`, or with a row a constraint, zeros at the ends of the shorter ones."""

    @property
    def low(self) -> float:
        """The least value."""

    @property
    def high(self) -> float:
        """The largest value."""

    @property
    def ramp(self) -> float:
        """The part of a stage in which the targets rise, unless the scheme says otherwise."""

    def learning_rate(self, steps: int) -> float:
        """Of a stage of `steps`, unless the scheme says otherwise."""

    def start(self, count: int, seed: int) -> torch.Tensor:
        """All gates open, float32."""

    def ranked(self, rank: torch.Tensor) -> torch.Tensor:
        """All gates about open, those of higher `rank` (0 to 1) more so, float32."""

    def draw(self, values: torch.Tensor, seed: int, step: int) -> torch.Tensor:
        """z of a step, differentiable in `values`, the same on every rank."""

    def openness(self, values: torch.Tensor) -> torch.Tensor:
        """What a constraint sums, from 0 to 1."""

    def slope(self, values: torch.Tensor) -> torch.Tensor:
        """∂openness / ∂values."""

    def binarization_gradient(self, values: torch.Tensor, hold: float) -> torch.Tensor:
        """What pushes the gates apart, beside the task: a gradient in units of the task's own root mean square.

        Args:
            values: The gates.
            hold: The part that is over of the time in which the targets hold, 0 to 1.
        """


@dataclass(frozen=True, kw_only=True)
class Deterministic:
    """z itself is trained, on the constraint's simplex, and a concave term makes it binary.

    min over z ∈ [0, 1]ⁿ of L_task(z) + c · Σ z_j (1 − z_j) subject to Σ cost_j z_j = 1 − t. With c = 0 the optimum is
    fractional; c grows linearly from 0, when the target is reached, to the end. How large it must be before nothing
    between 0 and 1 is stable depends on the loss: a block's curvature is many times a dim's. So where gates of a
    constraint are still in between near the end, c grows without bound for them (the homotopy of Murray and Ng, "An
    algorithm for nonlinear optimization problems with binary variables", 2010); where none are, it does not, since
    gates under less pressure still change places for the better. No noise is drawn, so a few dozen steps tell units
    apart.
    """

    concavity: float = 2.0
    """Where c's linear growth leads to, in units of the root mean square of a gate's gradient."""
    last: float = 0.4
    """The part of the way in which c grows without bound where it must."""
    fractional: float = 0.03
    """Mean of 4 z (1 − z) over the open gates of a constraint from which on the growth is whole."""
    ramp: float = 0.4
    low: float = 0.0
    high: float = 1.0
    least_rate: float = 0.02
    most_rate: float = 0.1

    def learning_rate(self, steps: int) -> float:
        return min(self.most_rate, max(self.least_rate, 10.0 / steps))

    def start(self, count: int, seed: int) -> torch.Tensor:  # noqa: ARG002
        return torch.ones(count)

    def ranked(self, rank: torch.Tensor) -> torch.Tensor:
        return 0.8 + 0.2 * rank.float()

    def draw(self, values: torch.Tensor, seed: int, step: int) -> torch.Tensor:  # noqa: ARG002
        return values * 1.0

    def openness(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def slope(self, values: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(values)

    def binarization_gradient(self, values: torch.Tensor, hold: float) -> torch.Tensor:
        growth = 1 / min(1.0, max(0.02, (1 - hold) / self.last))
        between = (4 * values * (1 - values)).sum(-1, keepdim=True) / values.sum(-1, keepdim=True).clamp(min=1e-9)
        c = self.concavity * hold * growth ** (between / self.fractional).clamp(max=1.0)
        return c * (1 - 2 * values)


@dataclass(frozen=True, kw_only=True)
class HardConcrete:
    """logα is trained through samples of the hard concrete distribution (Louizos et al., ICLR 2018)."""

    initial_log_alpha: float = 3.0
    """Where all gates start, but for a jitter of 0.01 against ties."""
    ramp: float = 0.6
    low: float = -7.0
    """P(z ≠ 0) is 0.0045 there, so that closed gates do not eat into the budget of the open ones."""
    high: float = 4.6

    def learning_rate(self, steps: int) -> float:
        """Far enough in a third of the stage to close an open gate, within the range that trains well."""
        return min(1.0, max(0.05, 30.0 / steps))

    def start(self, count: int, seed: int) -> torch.Tensor:
        return self.initial_log_alpha + 0.01 * torch.randn(count, generator=generator(seed, "gates", "start"))

    def ranked(self, rank: torch.Tensor) -> torch.Tensor:
        return 4.0 * rank.float()

    def draw(self, values: torch.Tensor, seed: int, step: int) -> torch.Tensor:
        return sample(values, uniform_noise(len(values), generator(seed, "gates", step)))

    def openness(self, values: torch.Tensor) -> torch.Tensor:
        return probability_open(values)

    def slope(self, values: torch.Tensor) -> torch.Tensor:
        p = probability_open(values)
        return p * (1 - p)

    def binarization_gradient(self, values: torch.Tensor, hold: float) -> torch.Tensor:  # noqa: ARG002
        return torch.zeros_like(values)
