"""Which kinds of units a model's pruning took its parameters from.

What a unit costs depends on the others, so the differences of single kinds do not add up to the whole. Here all units
go at once and evenly, from the whole model to the pruned one, and each kind is charged what its units cost on the way,
∫ ∂N/∂k dk (the values of Aumann and Shapley, "Values of non-atomic games", 1974). These add up to what was removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cook.config.kinds import Kind
from cook.pruning.budgets import KINDS
from cook.pruning.count_pricing import count_pricing
from cook.pruning.counts import Kept, parameters
from cook.pruning.units import PruningSpace, UnitGroup

# Gauss-Legendre on [0, 1], exact for polynomials of degree 5: no weight depends on more than five kinds of units.
NODES, WEIGHTS = (0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5), (5 / 18, 8 / 18, 5 / 18)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one kind of units lost."""

    kind: Kind
    before: int
    """Units of the whole model; head dimensions of one head."""
    after: int
    parameters: int
    """Parameters that went with them."""


def spending(space: PruningSpace, kept: Kept) -> list[Spent]:
    """What each kind of units lost, in the order of `KINDS`; keys and values are charged to the heads.

    A block without units counts as a removed block.

    Args:
        space: The whole model's space.
        kept: Units kept by group name; a group that is not named keeps all.
    """
    groups = [group for kind in KINDS for group in space.of(kind)]
    gone = {space.block(g).name for g in groups if g.layer >= 0 and not kept.get(g.name, g.size)}

    def left(group: UnitGroup, *, whole_if_gone: bool) -> int:
        if group.layer < 0 or space.block(group).name not in gone:
            return kept.get(group.name, group.size)
        return group.size if whole_if_gone and group.kind != "layer" else 0

    pricing = count_pricing(space, groups, (), lambda units: parameters(space, units))
    full = torch.tensor([float(group.size) for group in groups], dtype=torch.float64)
    end = torch.tensor([float(left(group, whole_if_gone=True)) for group in groups], dtype=torch.float64)
    charged = torch.zeros_like(full)
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        charged += weight * pricing.prices(full + node * (end - full))[1]
    charged *= (full - end) * pricing.whole
    found = []
    for kind in KINDS:
        own = [number for number, group in enumerate(groups) if group.kind == kind]
        paid = [number for number, g in enumerate(groups) if g.kind == kind or (kind, g.kind) == ("heads", "keys")]
        if own and kind != "keys":
            sizes = [(groups[n].size, left(groups[n], whole_if_gone=False)) for n in own]
            before, after = (
                sum(groups[n].members * pair[i] for n, pair in zip(own, sizes, strict=True)) for i in (0, 1)
            )
            found.append(Spent(kind=kind, before=before, after=after, parameters=round(float(charged[paid].sum()))))
    return found
