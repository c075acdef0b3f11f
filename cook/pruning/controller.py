"""The optimizer of the gates: Adam on the task loss, and one exact Lagrange multiplier per constraint.

The problem is that of Wang, Wohlwend and Lei ("Structured pruning of large language models", EMNLP 2020, sec. 3.2):

    min over x, max over λ of   L_task(x) + Σ_c λ_c · (t_c − s_c(x)),      x: one value per gate (logα, or z),

Gradient ascent on λ oscillates: with Adam the gates move at nearly full speed in either direction, so λ lags behind.
Here the inner maximum is taken exactly instead. The gates take a step of Adam, and the multiplier adds a gradient:

    x ← x − η · clip((m − λ·∂s/∂x) / (√v + ε) + b, ±1),      m, v: moments of the task gradient alone,

λ_c, the cost in loss per unit of sparsity, is the number for which the step ends on the target. s_c increases
monotonically in λ_c, so bracketing finds it. This projects the gates on the constraint in Adam's own metric: a gate
closes when the cost of its parameters exceeds what the task loses by closing it. Nothing needs tuning to the number of
units, to the number of steps, or to the scale of the loss. The relaxation (`relaxation.py`) defines x, its range, how s
depends on it, and the gradient b that makes it binary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cook.pruning.count_pricing import Priced
from cook.pruning.relaxation import Relaxation, of_gates, share_of_kind

HALVINGS = 8
"""Halvings of the initial range of log|λ|, which spans many decades: from 60 nats to a quarter of one."""
NEARBY = 1.1
"""Factor around the last step's λ within which the next one is looked for first."""
MOST_SECANTS = 40
NEAR_ENOUGH = 1e-13
"""Allowed difference between the sparsity and its target."""


class Pricing(Priced, Protocol):
    """Costs that change with the sizes of the blocks, as measured times do."""

    def linearised(self, openness: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Costs and offset of the kept share's tangent at `openness`: share ≈ Σ cost·openness + offset."""


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A target for the expected sparsity of consecutive gates.

    s = 1 − Σ_j cost_j · openness_j, where a unit's cost is its share of the parameters (or of the units). With a
    pricing, the costs follow the sizes: every step uses the tangent at the present gates.
    """

    name: str
    start: int
    """The first gate's index in the flat vector of all gates."""
    groups: tuple[str, ...] = ()
    """Names of the groups whose gates they are."""
    costs: tuple[float, ...]
    """Each gate's share; they sum to 1."""
    target: float
    """The sparsity at the end, in [0, 1)."""
    owners: tuple[int, ...] = ()
    """For each gate, the gate by which it is multiplied too (counted within the constraint), or -1; empty: none is. The
    owner goes with the last of its gates: key-value heads own their query heads."""
    pricing: Pricing | None = None
    """Replaces `costs`, which then hold only when all gates are open."""
    multiples: tuple[tuple[int, int], ...] = ()
    """For consecutive groups of gates: their number, and the number of which the kept ones are a multiple."""
    least: tuple[tuple[int, int], ...] = ()
    """For consecutive groups of gates: their number, and how many of them always stay; empty: none."""
    kinds: tuple[int, ...] = ()
    """For each gate, the number of its kind of unit; empty: all are of one kind."""
    early: tuple[bool, ...] = ()
    """For each gate, whether it decides early (`Deterministic`); empty: none does."""

    def protected(self, values: torch.Tensor) -> torch.Tensor:
        """The gates that always stay, bool `[gates]`: the largest `values` of each group that keeps some."""
        found, start = torch.zeros(len(self.costs), dtype=torch.bool), 0
        for size, least in self.least:
            found[start + values[start : start + size].topk(least).indices] = True
            start += size
        return found


class GateController:
    """Adam for gates, with an exact multiplier per constraint.

    Every gate belongs to exactly one constraint. Everything is float64 on the CPU: a few thousand numbers.

    Args:
        constraints: They cover the flat vector of gates without gaps, in order.
        relaxation: Defines a gate's value.
        learning_rate: The largest move of a gate per step.
        betas: Decay of the moments of the task gradient.
    """

    def __init__(
        self,
        constraints: Sequence[Constraint],
        relaxation: Relaxation,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.99),
    ):
        sizes = [len(c.costs) for c in constraints]
        assert [c.start for c in constraints] == [sum(sizes[:i]) for i in range(len(sizes))], "gaps between constraints"
        self.constraints, self.relaxation = tuple(constraints), relaxation
        self.learning_rate, self.betas = learning_rate, betas
        # One row per constraint, padded to the longest; the padding has no cost.
        self._real = torch.arange(max(sizes, default=0)) < torch.tensor(sizes)[:, None]
        self._costs = self._rows(torch.tensor([cost for c in constraints for cost in c.costs], dtype=torch.float64))
        self._offsets = torch.zeros(len(sizes), dtype=torch.float64)
        kinds = torch.tensor([kind for c in constraints for kind in c.kinds or (0,) * len(c.costs)]).long()
        self._kinds = self._rows(kinds) if kinds.any() else None
        self._early = self._rows(torch.tensor([float(e) for c in constraints for e in c.early or (0,) * len(c.costs)]))
        self.moment = torch.zeros(sum(sizes), dtype=torch.float64)
        self.second_moment = torch.zeros(sum(sizes), dtype=torch.float64)
        self.steps = 0
        self.multipliers = torch.zeros(len(sizes), dtype=torch.float64)

    def _rows(self, flat: torch.Tensor) -> torch.Tensor:
        """A flat vector as `[constraints, longest]`, padded with zeros."""
        if self._real.numel() == len(flat):  # nothing to pad
            return flat.view(self._real.shape)
        return torch.zeros(self._real.shape, dtype=flat.dtype).masked_scatter_(self._real, flat)

    def _flat(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `_rows`."""
        return rows.flatten() if self._real.numel() == len(self.moment) else rows[self._real]

    def expected_sparsity(self, values: torch.Tensor) -> torch.Tensor:
        """s of every constraint, float64 `[constraints]`."""
        rows = self._rows(values.double())
        self._reprice(rows)
        return self._sparsity(rows)

    def _reprice(self, rows: torch.Tensor) -> None:
        """Sets the costs of constraints with a pricing to their tangent at these values."""
        for number, constraint in enumerate(self.constraints):
            if constraint.pricing is not None:
                openness = self.relaxation.openness(rows[number, : len(constraint.costs)])
                costs, self._offsets[number] = constraint.pricing.linearised(openness)
                self._costs[number, : len(costs)] = costs

    def _sparsity(self, rows: torch.Tensor) -> torch.Tensor:
        kept: torch.Tensor = torch.linalg.vecdot(self._costs, self.relaxation.openness(rows))
        return 1 - self._offsets - kept

    @torch.no_grad()
    def step(
        self,
        values: torch.Tensor,
        gradient: torch.Tensor,
        targets: torch.Tensor,
        *,
        hold: float = 0.0,
        highest: torch.Tensor | None = None,
    ) -> None:
        """Moves `values` in place by one step that ends on `targets` if the learning rate allows it.

        Args:
            values: Flat gates, float32 `[gates]`.
            gradient: ∂L_task/∂values, averaged over ranks and micro-batches, `[gates]`.
            targets: The sparsity targets of this step, `[constraints]`.
            hold: Progress, 0 to 1, of the phase after the targets' ramp; the binarization gradient grows with it.
            highest: The highest value of each gate, `[gates]`; None: the relaxation's.
        """
        self.steps += 1
        gradient = gradient.double()
        self.moment.lerp_(gradient, 1 - self.betas[0])
        self.second_moment.lerp_(gradient**2, 1 - self.betas[1])
        moment = self._rows(self.moment / (1 - self.betas[0] ** self.steps))
        scale = self._rows((self.second_moment / (1 - self.betas[1] ** self.steps)).sqrt())
        # A gate without any task gradient so far moves first, but not infinitely faster than the others of its kind.
        of_kind = share_of_kind(scale, self._real.to(scale), self._kinds)
        scale += of_gates(1e-2 * of_kind + 1e-30, self._kinds)

        relaxation, start = self.relaxation, self._rows(values.double())
        self._reprice(start)
        task = moment / scale + relaxation.binarization_gradient(start, hold, self._kinds, self._early)
        press = self._costs * relaxation.slope(start) / scale
        low, high = relaxation.low, relaxation.high
        floor = self._floor(start, task)
        bound = None if highest is None else self._rows(highest.double())

        reached = torch.empty_like(start)

        def moved(multipliers: torch.Tensor) -> torch.Tensor:
            # In place: new memory for each of the dozen calls would cost more than the arithmetic.
            pull = torch.addcmul(task, multipliers[:, None], press, out=reached).clamp_(-1, 1)
            torch.sub(start, pull, alpha=self.learning_rate, out=reached).clamp_(low, high)
            if floor is not None:
                torch.maximum(reached, floor, out=reached)
            return reached if bound is None else torch.minimum(reached, bound, out=reached)

        def reach() -> torch.Tensor:
            # At this bound every gate with a price moves by the full learning rate. Units of a closed block have none.
            return torch.where(press > 0, (1 + task.abs()) / press, 1e-30).amax(1)

        self.multipliers = self._solve(moved, targets.double(), reach)
        values.copy_(self._flat(moved(self.multipliers)))

    def _floor(self, start: torch.Tensor, task: torch.Tensor) -> torch.Tensor | None:
        """The lowest values of this step: the gates that the task wants most stay half open, as many as must stay."""
        if not any(constraint.least for constraint in self.constraints):
            return None
        low, half = self.relaxation.low, (self.relaxation.low + self.relaxation.high) / 2
        floor, wanted = torch.full_like(start, low), start - self.learning_rate * task.clamp(-1, 1)
        for row, constraint in enumerate(self.constraints):
            stays = constraint.protected(wanted[row])
            floor[row, : len(stays)][stays] = start[row, : len(stays)][stays].clamp(max=half)
        return floor

    def _solve(
        self, moved: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor, reach: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The λ that reaches `targets`, or the bound `reach` if the learning rate does not allow it.

        Uses secants in λ, in which s is nearly piecewise linear. The function value at an end that stays twice is
        halved (the Illinois variant of regula falsi: Dowell and Jarratt, BIT 11, 1971).
        """
        sign = self.multipliers.sign()

        def excess(sizes: torch.Tensor) -> torch.Tensor:
            return (self._sparsity(moved(sign * sizes)) - targets) * sign

        # λ rarely changes much from one step to the next.
        low, high = self.multipliers.abs() / NEARBY, self.multipliers.abs() * NEARBY
        below, above = excess(low), excess(high)
        if not bool(((below < 0) & (above >= 0)).all()):
            sign = torch.where(self._sparsity(moved(torch.zeros_like(targets))) > targets, -1.0, 1.0).double()
            furthest = torch.log(reach())
            low, high = _halved(excess, furthest - 60.0, furthest)
            below, above = excess(low), excess(high)
        best, least = torch.where(below.abs() < above.abs(), low, high), torch.minimum(below.abs(), above.abs())
        last = torch.zeros_like(sign)
        for _ in range(MOST_SECANTS):
            if bool(((least <= NEAR_ENOUGH) | (above <= 0)).all()):
                break
            middle = torch.where(above > below, high - above * (high - low) / (above - below), high)
            middle = torch.minimum(torch.maximum(middle, low), high)
            found = excess(middle)
            short, side = found < 0, torch.where(found < 0, -1.0, 1.0)
            again = side == last
            below, above = (
                torch.where(short, found, torch.where(again, below / 2, below)),
                torch.where(short, torch.where(again, above / 2, above), found),
            )
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
            closer = found.abs() < least
            best, least = torch.where(closer, middle, best), torch.where(closer, found.abs(), least)
            last = side
        return sign * best

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


def _halved(
    excess: Callable[[torch.Tensor], torch.Tensor], low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two ends of a shorter range of |λ| around the sign change of `excess`, by bisection of log|λ|."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        short = excess(middle.exp()) < 0
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return low.exp(), high.exp()


def ramp(progress: float, fraction: float, start: float, target: float) -> float:
    """The sparsity target at `progress` (0 to 1) of a stage: a linear rise in its first `fraction`, then constant."""
    return start + (target - start) * (min(1.0, progress / fraction) if fraction > 0 else 1.0)
