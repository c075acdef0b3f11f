"""Prices of units under a budget for the whole model, where the hidden size makes them depend on one another.

An FFN dimension has a weight per hidden dimension in every matrix, so it is cheaper once hidden dimensions are gone,
and a hidden dimension is cheaper once heads are. With k_g kept units per group and h kept hidden dimensions, a count of
parameters, FLOPs or bytes is

    N = c + Σ_g (a_g + b_g·h)·k_g + b·h + q·h²,

since no weight has more than one dimension of heads or FFN dimensions. (q·h²: products of the stream with itself, in a
model's head.) The numbers a, b, c, q are differences of the exact count, so there is no second count to maintain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from cook.pruning.units import PruningSpace, UnitGroup

Count = Callable[[Mapping[str, int]], float]
"""The exact count of the whole model with some units kept per group; a group that is not named keeps all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CountPricing:
    """The share of a count of the whole model that consecutive gates leave; hidden dimensions are among them."""

    sizes: tuple[int, ...]
    """Gates per group."""
    hidden: int
    """Which group has the hidden dimensions."""
    owners: tuple[int, ...]
    """As in `Constraint.owners`."""
    whole: float
    """N with all units."""
    own: torch.Tensor
    """a_g, float64 `[groups]`; b for the hidden group."""
    by_hidden: torch.Tensor
    """b_g, float64 `[groups]`; q for the hidden group."""
    block_rest: torch.Tensor
    """What else goes with the last unit of a group, such as the block's norms, as a + b·h: float64 `[2, groups]`."""

    def share(self, kept: torch.Tensor) -> float:
        """N / whole for the kept units per group, float64 `[groups]`; a block without units counts with its norms."""
        full = torch.tensor(self.sizes, dtype=torch.float64)
        return float(1 - (self._sum(full) - self._sum(kept)) / self.whole)

    def even(self, share: float) -> float:
        """The share of its units that every group keeps if all keep the same share, and `share` of N stays."""
        low, high, full = 0.0, 1.0, torch.tensor(self.sizes, dtype=torch.float64)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if self.share(full * middle) > share else (middle, high)
        return high

    def _sum(self, kept: torch.Tensor) -> torch.Tensor:
        return (self.own * kept).sum() + kept[self.hidden] * (self.by_hidden * kept).sum()

    def linearised(self, openness: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The tangent of the kept share at `openness`, float64 `[gates]`: share ≈ Σ cost·openness + offset."""
        kept = torch.stack([part.sum() for part in openness.split(list(self.sizes))])
        prices = self.own + self.by_hidden * kept[self.hidden]
        prices[self.hidden] += (self.by_hidden * kept).sum()
        costs = (prices / self.whole).repeat_interleave(torch.tensor(self.sizes))
        return costs, self.share(kept) - float(costs @ openness)

    def removed_after(self, order: torch.Tensor) -> torch.Tensor:
        """The removed share of N after 0, 1, 2, … of the gates in `order` are closed, float64 `[gates + 1]`.

        Gates that own others are not in `order`: an owner goes with the last of its gates.
        """
        steps, ends = self._with_owners(order)
        group = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))[steps]
        is_hidden = group == self.hidden
        hidden_before = self.sizes[self.hidden] - (is_hidden.cumsum(0) - is_hidden.long())
        # The hidden group's own price: b + Σ b_g·k_g + q·(2h − 1), with h before the step.
        coupled = torch.where(is_hidden, 0.0, self.by_hidden[group]).cumsum(0)
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        others = (self.by_hidden * sizes).sum() - self.by_hidden[self.hidden] * sizes[self.hidden] - coupled
        price = self.own[group] + self.by_hidden[group] * hidden_before
        price = torch.where(is_hidden, price + others + self.by_hidden[group] * (hidden_before - 1), price)
        for number, size in enumerate(self.sizes):
            places = (group == number).nonzero().flatten()
            if number != self.hidden and len(places) == size:
                price[places[-1]] += self.block_rest[0, number] + self.block_rest[1, number] * hidden_before[places[-1]]
                # The rest of a block also goes with every hidden dimension, until the block is gone.
                price[places[-1] + 1 :] -= torch.where(is_hidden[places[-1] + 1 :], self.block_rest[1, number], 0.0)
        removed = torch.cat([torch.zeros(1, dtype=torch.float64), price.cumsum(0)])
        return removed[ends] / self.whole

    def _with_owners(self, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`order` with each owner behind the last of its gates; and how many steps of it 0, 1, 2, … of `order` are."""
        if not self.owners:
            return order, torch.arange(len(order) + 1)
        owner = torch.tensor(self.owners)[order]
        left = {number: self.owners.count(number) for number in {*self.owners} - {-1}}
        steps, ends = [], [0]
        for gate, owning in zip(order.tolist(), owner.tolist(), strict=True):
            steps.append(gate)
            if owning >= 0:
                left[owning] -= 1
                steps += [owning] if not left[owning] else []
            ends.append(len(steps))
        return torch.tensor(steps), torch.tensor(ends)


def count_pricing(
    space: PruningSpace, groups: Sequence[UnitGroup], owners: tuple[int, ...], count: Count
) -> CountPricing:
    """The prices of units in consecutive groups of gates, one of which has the hidden dimensions."""
    hidden = next(number for number, group in enumerate(groups) if group.kind == "hidden")
    stream = groups[hidden]
    whole, fewer, fewest = (count({stream.name: stream.size - n}) for n in range(3))

    def priced(first: Mapping[str, int], then: Mapping[str, int]) -> tuple[float, float]:
        """What a step from some units to others takes, as a + b·h."""
        one, two = (count({**first, **cut}) - count({**then, **cut}) for cut in ({}, {stream.name: stream.size - 1}))
        return one - stream.size * (one - two), one - two

    own, by_hidden = torch.zeros(2, len(groups), dtype=torch.float64)
    block_rest = torch.zeros(2, len(groups), dtype=torch.float64)
    for number, group in enumerate(groups):
        if group.kind != "hidden":
            own[number], by_hidden[number] = priced({}, {group.name: group.size - 1})
    for number, group in enumerate(groups):
        if group.kind in ("heads", "dimff"):
            keys = space.keys_of(group)
            inside = [n for n, g in enumerate(groups) if g is group or g is keys]
            last, none = ({groups[n].name: units for n in inside} for units in (1, 0))
            each = torch.tensor(priced(last, none), dtype=torch.float64)
            block_rest[:, number] = each - torch.stack([own[inside].sum(), by_hidden[inside].sum()])
    square = (whole - fewer - (fewer - fewest)) / 2
    sizes = torch.tensor([group.size for group in groups], dtype=torch.float64)
    own[hidden] = whole - fewer - float((by_hidden * sizes).sum()) - square * (2 * stream.size - 1)
    by_hidden[hidden] = square
    return CountPricing(
        sizes=tuple(group.size for group in groups),
        hidden=hidden,
        owners=owners,
        whole=whole,
        own=own,
        by_hidden=by_hidden,
        block_rest=block_rest,
    )


def in_multiples(
    order: torch.Tensor, sizes: Sequence[int], multiples: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The order in which gates go if what stays of a group must be a multiple of a number.

    Consecutive gates of a group go at once, at the mean of their places in `order`.

    Args:
        order: Indices of gates, first to go first.
        sizes: Gates per group; the groups are consecutive.
        multiples: One per group; 1 if any number may stay.

    Returns:
        The new order, and after how many of its gates there is a permitted result.
    """
    chunk_of = torch.zeros(len(order), dtype=torch.long)  # by place in `order`
    first = 0
    for start, size, multiple in zip(accumulate([0, *sizes[:-1]]), sizes, multiples, strict=True):
        places = ((order >= start) & (order < start + size)).nonzero().flatten()
        chunk_of[places] = first + (torch.arange(len(places)) + -len(places) % multiple) // multiple
        first += len(places)
    _, chunk_of, counts = chunk_of.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, chunk_of, torch.arange(len(order)).double())
    by_mean = torch.argsort(means / counts, stable=True)
    place = torch.argsort(by_mean)
    return order[torch.argsort(place[chunk_of], stable=True)], torch.cat(
        [torch.zeros(1).long(), counts[by_mean].cumsum(0)]
    )
