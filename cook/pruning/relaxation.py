"""Relaxations of 0/1 masks: one number per unit, between 0 (removed) and 1 (kept), while a mask is learned.

Two relaxations share one controller and have the same methods. The values x are trained, one per gate;
z ∈ [0, 1] multiplies the unit; a constraint counts the openness.

|               | x             | z                                | openness | binary by the end through          |
|---------------|---------------|----------------------------------|----------|------------------------------------|
| deterministic | z itself      | x                                | x        | a concave term c · z(1 − z)        |
| hard concrete | logα          | a stretched, clamped sample      | P(z ≠ 0) | the noise: a half-open gate costs  |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from cook.base.seeds import generator


class Relaxation(Protocol):
    """The methods of a relaxation; tensors are `[gates]`, or have one row per constraint, padded with zeros."""

    @property
    def low(self) -> float:
        """The smallest value."""

    @property
    def high(self) -> float:
        """The largest value."""

    @property
    def ramp(self) -> float:
        """The default share of a stage in which the targets rise."""

    def learning_rate(self, steps: int) -> float:
        """The default learning rate for a stage of `steps` steps."""

    def start(self, count: int, seed: int) -> torch.Tensor:
        """The initial values with all gates open, float32 `[count]`."""

    def ranked(self, rank: torch.Tensor) -> torch.Tensor:
        """Initial values with all gates nearly open, those of higher `rank` (0 to 1) wider, float32."""

    def draw(self, values: torch.Tensor, seed: int, step: int) -> torch.Tensor:
        """z of step `step`, differentiable in `values`, the same on every rank."""

    def openness(self, values: torch.Tensor) -> torch.Tensor:
        """The value that a constraint sums, 0 to 1."""

    def slope(self, values: torch.Tensor) -> torch.Tensor:
        """∂openness / ∂values."""

    def binarization_gradient(
        self,
        values: torch.Tensor,
        hold: float,
        kinds: torch.Tensor | None = None,
        early: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient that makes gates binary, in units of the root mean square of the task's gradient.

        Args:
            values: The gate values.
            hold: Progress, 0 to 1, of the phase after the targets' ramp.
            kinds: The number of each gate's kind, int64, as `values`: each kind is judged to be binary by itself. None:
                all are of one kind.
            early: 1 for gates that must be nearly binary from the first step on, else 0; None: none of them.
        """


@dataclass(frozen=True, kw_only=True)
class Deterministic:
    """Trains z itself, on the constraint's simplex; a concave term makes it binary.

    min over z ∈ [0, 1]ⁿ of L_task(z) + c · Σ z_j (1 − z_j) subject to Σ cost_j z_j = 1 − t. With c = 0 the optimum is
    fractional; c grows linearly from 0 from the time the target is reached. How large c must be until no value
    between 0 and 1 is stable depends on the loss: the curvature of a block is many times that of an FFN dimension. So
    if gates of a kind are fractional near the end, c grows without bound for them (the homotopy of Murray and
    Ng, "An algorithm for nonlinear optimization problems with binary variables", 2010). If none are, it does not, since
    gates under a smaller c can still improve. No noise is drawn, so a few dozen steps are enough to rank the units.

    Some gates must decide early, while the target still rises: large units that share a budget with small ones. Half of
    a block, of all heads or of all hidden dimensions (whose norm cancels a common factor) costs the task far less
    than half of the loss without them. Such gates would take most of the budget while they are fractional, and
    could not keep it once they must be 0 or 1.
    """

    concavity: float = 2.0
    """The final value of c's linear growth, in units of the root mean square of a gate's gradient."""
    last: float = 0.4
    """The last share of the hold phase, in which c can grow without bound."""
    early_concavity: float = 2.0
    """c, from the first step on, of gates that decide early."""
    fractional: float = 0.03
    """Mean of 4 z (1 − z) over the open gates of a kind above which c grows at the full rate. Each kind of a constraint
    has its own: else 60 blocks would not count among 50,000 dims, and all would stay half open."""
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

    def binarization_gradient(
        self,
        values: torch.Tensor,
        hold: float,
        kinds: torch.Tensor | None = None,
        early: torch.Tensor | None = None,
    ) -> torch.Tensor:
        growth = 1 / min(1.0, max(0.02, (1 - hold) / self.last))
        between = share_of_kind(4 * values * (1 - values), values, kinds)
        c = of_gates(self.concavity * hold * growth ** (between / self.fractional).clamp(max=1.0), kinds)
        if early is not None:
            c = c.maximum(self.early_concavity * early)
        return c * (1 - 2 * values)


@dataclass(frozen=True, kw_only=True)
class HardConcrete:
    """Trains logα through samples of the hard concrete distribution (Louizos et al., ICLR 2018)."""

    initial_log_alpha: float = 3.0
    """The initial value of all gates, up to a jitter of 0.01 that breaks ties."""
    ramp: float = 0.6
    low: float = -7.0
    """P(z ≠ 0) is 0.0045 at this value, so that closed gates hardly count in the budget."""
    high: float = 4.6

    def learning_rate(self, steps: int) -> float:
        """Large enough to close an open gate in a third of the stage, within the range that trains well."""
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

    def binarization_gradient(self, values: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.zeros_like(values)


def share_of_kind(part: torch.Tensor, whole: torch.Tensor, kinds: torch.Tensor | None) -> torch.Tensor:
    """For each row and kind, Σ part / Σ whole over the gates of that kind, `[..., kinds]`.

    Args:
        part, whole: `[..., gates]`.
        kinds: The number of each gate's kind, int64, as `part`; None: all are of one kind.
    """

    def summed(values: torch.Tensor) -> torch.Tensor:
        if kinds is None:
            return values.sum(-1, keepdim=True)
        sums = values.new_zeros(*values.shape[:-1], int(kinds.max()) + 1 if kinds.numel() else 1)
        return sums.scatter_add_(-1, kinds, values)

    return summed(part) / summed(whole).clamp(min=1e-30)


def of_gates(by_kind: torch.Tensor, kinds: torch.Tensor | None) -> torch.Tensor:
    """Each gate's value of a tensor `[..., kinds]`: `[..., gates]`, or `[..., 1]` if all are of one kind."""
    return by_kind if kinds is None else by_kind.gather(-1, kinds)


BETA = 2 / 3
GAMMA = -0.1
ZETA = 1.1
EPSILON = 1e-6
SHIFT = -BETA * math.log(-GAMMA / ZETA)
"""P(z ≠ 0) = σ(logα + SHIFT): the probability that the stretched variable is above 0."""


def uniform_noise(size: int, generator: torch.Generator) -> torch.Tensor:
    """u ~ U(ε, 1 − ε), float32 `[size]`."""
    return torch.rand(size, generator=generator) * (1 - 2 * EPSILON) + EPSILON


def sample(log_alpha: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Gates z ∈ [0, 1] for noise `u`, differentiable in `log_alpha`; same shape, float32 (eq. 10 and 11)."""
    s = torch.sigmoid((torch.logit(u) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def probability_open(log_alpha: torch.Tensor) -> torch.Tensor:
    """P(z ≠ 0) for each gate (eq. 12)."""
    return torch.sigmoid(log_alpha + SHIFT)
