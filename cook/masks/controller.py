"""Which gates close: the task loss ranks them, one multiplier a constraint holds the expected sparsity on its target.

The problem is Wang, Wohlwend and Lei's ("Structured pruning of large language models", EMNLP 2020, sec. 3.2):

    min over logα, max over λ of   L_task(logα) + Σ_c λ_c · (t_c − s_c(logα))

Gradient ascent on λ swings: Adam makes the gates' response bang-bang, so λ always arrives late. Here the inner
maximum is taken exactly instead. A step of the gates is Adam's, the multiplier enters it as one more gradient,

    logα ← logα − η · clip((m − λ·∂s/∂logα) / (√v + ε), ±1),      m, v: moments of the task gradient alone,

and λ_c, the price in loss of a unit of sparsity, is the one number for which the step ends on the target: s_c grows
with λ_c, so bisection finds it. The gates are thereby projected on the constraint in Adam's own metric: a gate falls
when the price of its parameters exceeds what the task loses by it. Nothing needs tuning to the number of units, to
the number of steps, or to the scale of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cook.masks.hard_concrete import probability_open

LOG_ALPHA_MIN, LOG_ALPHA_MAX = -7.0, 4.6
"""P(z ≠ 0) from 0.0045 to 0.998: low enough that closed gates do not eat into the budget of the open ones."""
BISECTIONS = 40
"""Halvings of the range of log|λ|: 60 nats to 6e-11."""


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A target for the expected sparsity of some consecutive gates.

    s = 1 − Σ_j cost_j · P(z_j ≠ 0), the cost being each unit's share of the parameters (or of the units).
    """

    name: str
    start: int
    """The first gate's index in the flat vector of all gates."""
    costs: tuple[float, ...]
    """Each gate's share; they sum to 1."""
    target: float
    """The sparsity to end with, in [0, 1)."""


class GateController:
    """Adam for gates with an exact multiplier a constraint.

    Every gate belongs to exactly one constraint. All in float64 on the CPU: a few thousand numbers.

    Args:
        constraints: They cover the flat vector of gates without gaps, in order.
        learning_rate: The most that a logα moves in a step.
        betas: Decay of the moments of the task gradient.
    """

    def __init__(
        self, constraints: Sequence[Constraint], *, learning_rate: float, betas: tuple[float, float] = (0.9, 0.99)
    ):
        sizes = [len(c.costs) for c in constraints]
        assert [c.start for c in constraints] == [sum(sizes[:i]) for i in range(len(sizes))], "gaps between constraints"
        self.constraints = tuple(constraints)
        self.learning_rate, self.betas = learning_rate, betas
        self._owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        self._costs = torch.tensor([cost for c in constraints for cost in c.costs], dtype=torch.float64)
        self._sizes = torch.tensor(sizes, dtype=torch.float64)
        self.moment = torch.zeros(sum(sizes), dtype=torch.float64)
        self.second_moment = torch.zeros(sum(sizes), dtype=torch.float64)
        self.steps = 0
        self.multipliers = torch.zeros(len(sizes), dtype=torch.float64)

    def expected_sparsity(self, log_alpha: torch.Tensor) -> torch.Tensor:
        """s of every constraint, float64 `[constraints]`."""
        return 1 - self._sum(self._costs * probability_open(log_alpha.double()))

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(self.constraints), dtype=torch.float64).index_add_(0, self._owner, values)

    @torch.no_grad()
    def step(self, log_alpha: torch.Tensor, gradient: torch.Tensor, targets: torch.Tensor) -> None:
        """Moves `log_alpha` in place by one step that ends on `targets` wherever `learning_rate` allows it.

        Args:
            log_alpha: Flat gates, float32 `[gates]`.
            gradient: ∂L_task/∂logα, averaged over ranks and micro-batches, `[gates]`.
            targets: The sparsity wanted now, `[constraints]`.
        """
        self.steps += 1
        gradient = gradient.double()
        self.moment.lerp_(gradient, 1 - self.betas[0])
        self.second_moment.lerp_(gradient**2, 1 - self.betas[1])
        moment = self.moment / (1 - self.betas[0] ** self.steps)
        scale = (self.second_moment / (1 - self.betas[1] ** self.steps)).sqrt()
        # A gate that the task has not touched yields at once, but not infinitely sooner than its neighbours.
        scale = scale + 1e-2 * (self._sum(scale) / self._sizes)[self._owner] + 1e-30

        start = log_alpha.double()
        p = probability_open(start)
        task, press = moment / scale, self._costs * p * (1 - p) / scale

        def moved(multipliers: torch.Tensor) -> torch.Tensor:
            pull = (task + multipliers[self._owner] * press).clamp(-1, 1)
            return (start - self.learning_rate * pull).clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX)

        self.multipliers = self._bisect(moved, targets.double(), task, press)
        log_alpha.copy_(moved(self.multipliers))

    def _bisect(
        self,
        moved: Callable[[torch.Tensor], torch.Tensor],
        targets: torch.Tensor,
        task: torch.Tensor,
        press: torch.Tensor,
    ) -> torch.Tensor:
        """The λ nearest to 0 that reaches `targets`; the bound where the step's length does not allow it."""
        # At this bound every gate of the constraint moves by the full learning rate.
        reach = torch.zeros_like(targets).scatter_reduce_(0, self._owner, (1 + task.abs()) / press, "amax")
        open_more = self.expected_sparsity(moved(torch.zeros_like(targets))) > targets
        sign = torch.where(open_more, -1.0, 1.0).double()
        # |λ| spans many decades, so its logarithm is bisected.
        low, high = torch.log(reach) - 60.0, torch.log(reach)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            short = (self.expected_sparsity(moved(sign * middle.exp())) - targets) * sign < 0
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return sign * high.exp()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {
            "moment": self.moment.clone(),
            "second_moment": self.second_moment.clone(),
            "multipliers": self.multipliers.clone(),
            "steps": torch.tensor(self.steps),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.moment, self.second_moment = state["moment"].clone(), state["second_moment"].clone()
        self.multipliers, self.steps = state["multipliers"].clone(), int(state["steps"])


def ramp(step: int, steps: int, fraction: float, start: float, target: float) -> float:
    """The sparsity wanted after step `step` of `steps`: rises linearly in the first `fraction` of them, then holds."""
    return start + (target - start) * min(1.0, step / max(1.0, fraction * steps))
