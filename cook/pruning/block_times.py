"""Measured times of blocks of different sizes, for budgets in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cook.base.errors import UserError
from cook.base.files import read_json
from cook.config.kinds import Kind
from cook.pruning.count_pricing import kept_after
from cook.pruning.units import WIDE, PruningSpace, UnitGroup

FLATTEST = 1e-3
"""The lowest slope of a curve, as a share of its mean slope: a unit that costs nothing would have no price."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Milliseconds of one block over the share of its units that are kept, linear between the measured points."""

    shares: tuple[float, ...]
    """Ascending, from 0 to 1."""
    ms: tuple[float, ...]
    """Ascending, from 0: a block without units is gone."""

    def at(self, shares: torch.Tensor) -> torch.Tensor:
        """Milliseconds at some shares, float64 of the same shape."""
        low, slope = self._piece(shares)
        return self._ms[low] + slope * (shares - self._shares[low])

    def slope(self, shares: torch.Tensor) -> torch.Tensor:
        """∂ms / ∂share, float64 of the same shape; above 0."""
        return self._piece(shares)[1].clamp(min=FLATTEST * self.ms[-1])

    @property
    def _shares(self) -> torch.Tensor:
        return torch.tensor(self.shares, dtype=torch.float64)

    @property
    def _ms(self) -> torch.Tensor:
        return torch.tensor(self.ms, dtype=torch.float64)

    def _piece(self, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        knots, ms = self._shares, self._ms
        low = torch.searchsorted(knots, shares.contiguous(), right=True).clamp(1, len(knots) - 1) - 1
        return low, ((ms[1:] - ms[:-1]) / (knots[1:] - knots[:-1]))[low]


@dataclass(frozen=True, kw_only=True)
class BlockTimes:
    """The time of a forward pass as a sum over its blocks. `cook profile` measures it."""

    rest: float
    """Milliseconds of everything outside the attention and FFN blocks."""
    heads: Curve
    """An attention block."""
    dimff: Curve
    """An FFN block."""
    num_layers: int
    """Layers of the model that was measured."""
    settings: dict[str, Any]
    """Device, dtype, batch size and length of the measurement, and the model's name."""
    wide: dict[str, Curve] = field(default_factory=dict)
    """For `hidden` and `head_dims`: milliseconds of the whole model over the share of these dimensions, if measured."""

    def factor(self, kind: Kind, share: torch.Tensor) -> torch.Tensor:
        """By what the time of the whole model is multiplied with fewer hidden dimensions, that of attention with fewer
        head dimensions; float64 of the same shape. Times of several sizes at once are taken to be products.
        """
        curve = self.wide[kind]
        most, saved = curve.ms[-1], curve.ms[-1] - curve.at(share)
        attention = min(most, self.num_layers * self.heads.ms[-1])
        return (1 - saved / (most if kind == "hidden" else max(attention, 1e-9))).clamp(min=0)

    def curve(self, group: UnitGroup) -> Curve:
        """The curve of a group of heads or FFN dimensions."""
        return self.heads if group.kind == "heads" else self.dimff

    def total(self, space: PruningSpace, kept: Mapping[str, int]) -> float:
        """Milliseconds of a forward pass with the units in `kept`; a group that is not named keeps all."""
        times = {"heads": 0.0, "dimff": self.rest}
        for group in (*space.groups, *space.unprunable):
            if group.kind in times:
                units = kept.get(group.name, group.size) * kept.get(space.block(group).name, 1)
                times[group.kind] += float(self.curve(group).at(torch.tensor(units / group.size, dtype=torch.float64)))
        factors = {
            g.kind: float(self.factor(g.kind, torch.tensor(kept[g.name] / g.size, dtype=torch.float64)))
            for g in space.every
            if g.kind in WIDE and kept.get(g.name, g.size) < g.size
        }
        return (times["heads"] * factors.get("head_dims", 1.0) + times["dimff"]) * factors.get("hidden", 1.0)

    @property
    def whole(self) -> float:
        """Milliseconds of a forward pass of the whole model."""
        return self.rest + self.num_layers * (self.heads.ms[-1] + self.dimff.ms[-1])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_block_times(path: str | Path) -> BlockTimes:
    """Reads the file that `cook profile` wrote.

    Raises:
        UserError: it cannot be read, or is another file.
    """
    content = read_json(path)
    try:
        curves = {name: Curve(**{k: tuple(v) for k, v in content[name].items()}) for name in ("heads", "dimff")}
        wide = {name: Curve(**{k: tuple(v) for k, v in own.items()}) for name, own in content.get("wide", {}).items()}
        return BlockTimes(**content | curves | {"wide": wide})
    except (TypeError, KeyError, AttributeError, ValueError):
        raise UserError(f"{path}: not a table of block times", wanted="the file that `cook profile` writes") from None


@dataclass(frozen=True, kw_only=True)
class TimePricing:
    """The share of measured time that consecutive gates remove. A gate's cost depends on the size of its block."""

    sizes: tuple[int, ...]
    """Gates per group."""
    curves: tuple[Curve, ...]
    """One per group."""

    @property
    def whole(self) -> float:
        """Milliseconds of all groups with all units."""
        return sum(curve.ms[-1] for curve in self.curves)

    def linearised(self, openness: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The tangent of the kept share of time at `openness`: share ≈ Σ cost·openness + offset.

        Args:
            openness: Of every gate, float64 `[gates]`.

        Returns:
            Costs, float64 `[gates]`, and the offset.
        """
        costs, share = [], 0.0
        for values, curve in zip(openness.split(list(self.sizes)), self.curves, strict=True):
            kept = values.mean()
            costs.append((curve.slope(kept) / (len(values) * self.whole)).expand(len(values)))
            share += float(curve.at(kept)) / self.whole
        flat = torch.cat(costs)
        return flat, share - float(flat @ openness)

    def removed_after(self, order: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """The removed share of time after 0, 1, 2, … gates are closed in this order, float64 `[gates + 1]`."""
        order = torch.as_tensor(order)
        group_of = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))[order]
        left = torch.zeros(len(order) + 1, dtype=torch.float64)
        for number, (size, curve) in enumerate(zip(self.sizes, self.curves, strict=True)):
            gone = torch.cat([torch.zeros(1), (group_of == number).cumsum(0)]).double()
            left += curve.at(1 - gone / size)
        return 1 - left / self.whole


@dataclass(frozen=True, kw_only=True)
class WholeTimePricing:
    """The share of the whole model's time that consecutive gates leave, where blocks, head or hidden dimensions are
    among them."""

    space: PruningSpace
    groups: tuple[UnitGroup, ...]
    """Of whole key-value heads, which are what was measured."""
    owners: tuple[int, ...]
    """As in `Constraint.owners`."""
    times: BlockTimes
    before: Mapping[str, int]
    """Units that fixed masks leave, by group name."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Gates per group."""
        return tuple(group.size for group in self.groups)

    @property
    def whole(self) -> float:
        """Milliseconds with all units of the groups."""
        return float(self._ms([torch.tensor(float(size), dtype=torch.float64) for size in self.sizes]))

    def _ms(self, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        """Milliseconds for the kept units of each group, which may be columns of many models."""
        units = dict(zip((group.name for group in self.groups), kept, strict=True))

        def of(group: UnitGroup) -> torch.Tensor:
            return units.get(group.name, torch.tensor(float(self.before.get(group.name, group.size))).double())

        attention, others = torch.zeros(()).double(), torch.tensor(self.times.rest).double()
        for group in (*self.space.groups, *self.space.unprunable):
            if group.kind in ("heads", "dimff"):
                ms = self.times.curve(group).at(of(group) / group.size) * of(self.space.block(group))
                attention, others = (attention + ms, others) if group.kind == "heads" else (attention, others + ms)
        wide = {g.kind: self.times.factor(g.kind, of(g) / g.size) for g in self.groups if g.kind in WIDE}
        return (attention * wide.get("head_dims", 1.0) + others) * wide.get("hidden", 1.0)

    def linearised(self, openness: torch.Tensor) -> tuple[torch.Tensor, float]:
        """As `TimePricing.linearised`."""
        with torch.enable_grad():
            kept = [part.sum().requires_grad_() for part in openness.detach().split(list(self.sizes))]
            share = self._ms(kept) / self.whole
            found = torch.autograd.grad(share, kept, allow_unused=True)
        sizes = torch.tensor(self.sizes)
        prices = torch.stack([torch.zeros(()).double() if price is None else price for price in found])
        prices = prices.clamp(min=FLATTEST / float(sizes.sum()))
        costs = prices.repeat_interleave(sizes)
        return costs, float(share.detach()) - float(costs @ openness)

    def removed_after(self, order: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """As `TimePricing.removed_after`; gates that own others are not in `order`."""
        kept = kept_after(self.sizes, self.owners, torch.as_tensor(order))
        return 1 - self._ms([column.double() for column in kept]) / self.whole
