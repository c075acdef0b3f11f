"""Prices of units under one budget for the whole model, where what a unit costs depends on how many others there are.

An FFN dimension has a weight per hidden dimension in every matrix, so it is cheaper once hidden dimensions are gone; a
head dimension costs a row per head, and a block takes all its units along. With k_g kept units per group, a count of
parameters, FLOPs or bytes is a polynomial,

    N = Σ_j c_j · Π k_g,

in which a product has units of one block, head and hidden dimensions, and the block itself (1 as long as it has units,
since its norms go with the last of them). The coefficients are mixed differences of the exact count, so there is no
second count to maintain, and no kind of unit is known here by name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, combinations
from math import prod
from typing import Protocol

import torch

from cook.pruning.units import WIDE, PruningSpace, UnitGroup

Count = Callable[[Mapping[str, int]], float]
"""The exact count of the whole model with some units kept per group; a group that is not named keeps all."""
NEAR = 5e-4
"""The difference from a budget, as a share of it, for which no smaller units are looked for."""
MOST_MOVED = 16
"""Groups of large units whose rest may stay for smaller ones."""
Product = tuple[int, ...]
"""The places of groups; one may occur twice."""


class Priced(Protocol):
    """Prices of gates in consecutive groups."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Gates per group."""

    def removed_after(self, order: torch.Tensor) -> torch.Tensor:
        """The removed share after 0, 1, 2, … of the gates in `order` are closed, float64 `[gates + 1]`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CountPricing:
    """The share of a count of the whole model that consecutive gates leave."""

    sizes: tuple[int, ...]
    """Gates per group."""
    owners: tuple[int, ...]
    """As in `Constraint.owners`."""
    whole: float
    """N with all units."""
    factors: torch.Tensor
    """The numbers of the variables in each product, int64 `[products, most]`. A variable is the units of a group, in
    the order of `sizes`; or one of `blocks`; or, behind these, the number 1."""
    coefficients: torch.Tensor
    """float64 `[products]`."""
    blocks: tuple[tuple[int, ...], ...]
    """Blocks without a gate of their own, each as the groups inside of it: 1, or 0 if one of them has no units."""

    def share(self, kept: torch.Tensor) -> torch.Tensor:
        """N / whole for the kept units per group, float64 `[groups]`; a block without units counts with its norms."""
        variables = torch.cat([kept, kept.new_ones(len(self.blocks) + 1)])
        return (variables[self.factors].prod(1) * self.coefficients).sum() / self.whole

    def even(self, share: float) -> float:
        """The share of its units that every group keeps if all keep the same share, and `share` of N stays; blocks with
        gates of their own stay.
        """
        low, high, full = 0.0, 1.0, torch.tensor(self.sizes, dtype=torch.float64)
        for _ in range(50):
            middle = (low + high) / 2
            kept = torch.where(full > 1, full * middle, full)
            low, high = (low, middle) if float(self.share(kept)) > share else (middle, high)
        return high

    def linearised(self, openness: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The tangent of the kept share at `openness`, float64 `[gates]`: share ≈ Σ cost·openness + offset."""
        share, prices = self.prices(torch.stack([part.sum() for part in openness.split(list(self.sizes))]))
        costs = prices.repeat_interleave(torch.tensor(self.sizes))
        return costs, share - float(costs @ openness)

    def prices(self, kept: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The share for the kept units per group, and its derivatives by them, float64 `[groups]`."""
        with torch.enable_grad():
            kept = kept.detach().clone().requires_grad_()
            share = self.share(kept)
            (prices,) = torch.autograd.grad(share, kept)
        return float(share.detach()), prices

    def removed_after(self, order: torch.Tensor) -> torch.Tensor:
        """The removed share of N after 0, 1, 2, … of the gates in `order` are closed, float64 `[gates + 1]`.

        Gates that own others are not in `order`: an owner goes with the last of its gates.
        """
        kept = kept_after(self.sizes, self.owners, order)
        kept += [torch.stack([kept[number] for number in inside]).amin(0).clamp(max=1) for inside in self.blocks]
        total = torch.zeros(len(order) + 1, dtype=torch.float64)
        for factors, coefficient in zip(self.factors.tolist(), self.coefficients.tolist(), strict=True):
            product = torch.full((len(order) + 1,), coefficient, dtype=torch.float64)
            for factor in factors:
                product = product * kept[factor] if factor < len(kept) else product
            total += product
        return 1 - total / self.whole


def kept_after(sizes: Sequence[int], owners: Sequence[int], order: torch.Tensor) -> list[torch.Tensor]:
    """The kept units of each group after 0, 1, 2, … of the gates in `order` are closed, int64 `[gates + 1]` each.

    Args:
        sizes: Gates per group.
        owners: As in `Constraint.owners`; each owner goes with the last of its gates.
        order: Gates, first to go first, without those that own others.
    """
    steps, ends = order, torch.arange(len(order) + 1)
    if owners:
        left = Counter(owners)
        gone, marks = [], [0]
        for gate in order.tolist():
            gone.append(gate)
            while (gate := owners[gate]) >= 0:
                left[gate] -= 1
                if left[gate]:
                    break
                gone.append(gate)
            marks.append(len(gone))
        steps, ends = torch.tensor(gone, dtype=torch.long), torch.tensor(marks)
    group, start = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[steps], torch.zeros(1).long()
    return [size - torch.cat([start, (group == number).cumsum(0)])[ends] for number, size in enumerate(sizes)]


def count_pricing(
    space: PruningSpace, groups: Sequence[UnitGroup], owners: tuple[int, ...], count: Count
) -> CountPricing:
    """The prices of units in consecutive groups of gates."""
    number = {group.name: n for n, group in enumerate(groups)}
    wide = [group for group in groups if group.kind in WIDE]
    inside: dict[str, list[UnitGroup]] = {space.block(g).name: [] for g in groups if g.kind not in WIDE}
    for group in groups:
        if group.kind not in ("layer", *WIDE):
            inside[space.block(group).name].append(group)
    absent = {name: {name: 0} if name in number else {g.name: 0 for g in own} for name, own in inside.items()}
    without_blocks = {name: 0 for gone in absent.values() for name in gone}
    products: dict[Product, float] = {}

    def add(found: Mapping[Product, float], places: Sequence[UnitGroup], *more: int) -> None:
        for product, coefficient in found.items():
            products[(*(number[places[n].name] for n in product), *more)] = coefficient

    add(_polynomial(wide, lambda kept: count({**without_blocks, **kept}), square=True), wide)
    known: dict[object, dict[Product, float]] = {}
    ungated = [name for name in inside if name not in number]
    exists = number | {name: len(groups) + n for n, name in enumerate(ungated)}
    for name, own in inside.items():
        # Blocks that are alike have the same polynomial, whose variables are named by place.
        block = space.block(own[0]) if own else next(group for group in groups if group.name == name)
        units, gone = [*own, *wide], absent[name]
        alike = _shape_of(space, [block, *own]), name in number
        if alike not in known:
            known[alike] = _polynomial(units, partial(_of_block, count, gone))
        add(known[alike], units, exists[name])
    if space.shared:  # a norm that two blocks read belongs to neither: it counts as if it stayed
        full = [group.size for group in groups] + [1] * len(ungated)
        counted = sum(coefficient * prod(full[n] for n in product) for product, coefficient in products.items())
        products[()] = products.get((), 0.0) + count({}) - counted
    most = max(map(len, products))
    one = len(groups) + len(ungated)
    return CountPricing(
        sizes=tuple(group.size for group in groups),
        owners=owners,
        whole=count({}),
        factors=torch.tensor([[*product, *[one] * (most - len(product))] for product in products]),
        coefficients=torch.tensor([*products.values()], dtype=torch.float64),
        blocks=tuple(tuple(number[group.name] for group in inside[name]) for name in ungated),
    )


def _of_block(count: Count, gone: Mapping[str, int], kept: Mapping[str, int]) -> float:
    return count(kept) - count({**kept, **gone})


def _polynomial(groups: Sequence[UnitGroup], count: Count, *, square: bool = False) -> dict[Product, float]:
    """A count as Σ c · Π k_g, by the places of the groups in each product.

    By mixed differences where all units are kept: the count is linear in each k_g; with `square` also quadratic, as
    products of the stream with itself are.
    """
    found: dict[Product, float] = {}
    values = {
        gone: count({groups[n].name: groups[n].size - 1 for n in gone})
        for length in range(len(groups) + 1)
        for gone in combinations(range(len(groups)), length)
    }

    def add(places: Product, difference: float) -> None:
        """Adds difference · Π (k_g − K_g)."""
        for length in range(len(places) + 1) if difference else ():
            for left in combinations(range(len(places)), length):
                others = [groups[place].size for n, place in enumerate(places) if n not in left]
                product = tuple(places[n] for n in left)
                found[product] = found.get(product, 0.0) + difference * prod(-size for size in others)

    for places in values:
        parts = chain.from_iterable(combinations(places, length) for length in range(len(places) + 1))
        add(places, sum((-1) ** len(gone) * values[gone] for gone in parts))
    for n, group in enumerate(groups) if square else ():
        twice = values[()] - 2 * values[(n,)] + count({group.name: group.size - 2})
        add((n, n), twice / 2)
        add((n,), twice / 2)
    return {product: coefficient for product, coefficient in found.items() if coefficient}


def _shape_of(space: PruningSpace, groups: Sequence[UnitGroup]) -> object:
    """What the count of a block depends on: its weights' shapes, and which part of them belongs to its units."""
    layer = f".{groups[0].layer}."
    return repr(
        [
            (
                g.kind,
                g.size,
                g.sections,
                [(s.path.replace(layer, "."), space.shapes[s.path], s.dim, s.block) for s in g.slices],
            )
            for g in groups
        ]
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


def nearest_cut(
    pricing: Priced, order: torch.Tensor, allowed: torch.Tensor, *, target: float, least: int
) -> torch.Tensor:
    """The gates to close so that the removed share is nearest `target`.

    They are the first ones in `order`. If the last of them is of a group whose units are so large that the budget would
    be missed, the rest of its group stays, and smaller units after it go instead.

    Args:
        pricing: Counts the removed share, and knows the groups of the gates.
        order: Gates, first to go first.
        allowed: After how many of them there is a permitted result, ascending from 0.
        target: The share to remove.
        least: The first ones that are closed in any case.
    """
    lengths, count = allowed.diff(), len(allowed) - 1
    group_of = torch.arange(len(pricing.sizes)).repeat_interleave(torch.tensor(pricing.sizes))[order[allowed[:-1]]]
    chunk_of, chunks = torch.arange(count).repeat_interleave(lengths), torch.arange(count)
    best, closed = math.inf, order[:least]
    for _ in range(MOST_MOVED):
        moved = order[torch.argsort(torch.argsort(chunks)[chunk_of], stable=True)]
        ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths[chunks].cumsum(0)])
        removed = pricing.removed_after(moved)[ends]
        distances = (removed - target).abs().masked_fill(ends < least, math.inf)
        if float(distances.amin()) < best:
            best = float(distances.amin())
            closed = moved[: int(ends[distances.argmin()])]
        under = int(((removed <= target) | (ends < least)).sum()) - 1
        rest = chunks[under:]
        if best <= NEAR * (1 - target) or under < 0 or not len(rest):
            break
        is_large = group_of[rest] == group_of[rest[0]]
        if bool(is_large.all()):
            break
        chunks = torch.cat([chunks[:under], rest[~is_large], rest[is_large]])
    return closed
