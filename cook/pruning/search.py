"""Blocks removed one after the other by the loss that is measured without each of them.

A block is large: the gradient of its gate says little about the loss without it, and a few dozen noisy steps see each
combination of blocks once. A measured loss needs forward passes only, and compares candidates on the same batches (Song
et al., "SLEB", ICML 2024; Zhong et al., "BlockPruner", 2024). Most candidates keep the increase that an earlier round
measured, since it changes slowly: a round measures the cheapest candidates again until the best one is up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from cook.config.scheme import BlockUnit
from cook.pruning.counts import unit_parameters
from cook.pruning.units import PruningSpace, UnitGroup

Measure = Callable[[Mapping[str, torch.Tensor]], float]
"""The loss under masks of 0 and 1 by group name; absent groups are open."""
MOST_LOOKS = 8
"""Candidates that one round measures at most, after the first round, which measures all."""


def search_blocks(
    measure: Measure, space: PruningSpace, blocks: Sequence[UnitGroup], target: float, *, unit: BlockUnit = "block"
) -> dict[str, torch.Tensor]:
    """Masks of blocks, 0 and 1 `[1]` by group name, that remove `target` of their parameters to the nearest unit.

    Each round removes the unit with the least increase of the loss per parameter.

    Args:
        measure: The loss under masks, on the same batches at every call.
        space: The model's space.
        blocks: The blocks that may go, groups of the kind `layer`.
        target: The share of their parameters to remove.
        unit: What is removed at once.
    """
    units: dict[tuple[int, str], list[UnitGroup]] = {}
    for group in blocks:
        units.setdefault((group.layer, group.site if unit == "block" else ""), []).append(group)
    sizes = {key: sum(unit_parameters(space, group) for group in groups) for key, groups in units.items()}
    wanted = target * sum(sizes.values())
    masks = {group.name: torch.ones(1) for group in blocks}

    def without(key: tuple[int, str]) -> dict[str, torch.Tensor]:
        return masks | {group.name: torch.zeros(1) for group in units[key]}

    left, removed = set(units), 0
    loss = measure(masks)
    increase = {key: (measure(without(key)) - loss) / sizes[key] for key in sorted(units)}
    fresh = set(units)
    while True:
        # Only a unit that brings the sum nearer to the target may go.
        fitting = sorted(key for key in left if abs(removed + sizes[key] - wanted) < abs(removed - wanted))
        if not fitting:
            return masks
        looks = 0
        best = min(fitting, key=increase.__getitem__)
        while best not in fresh and looks < MOST_LOOKS:
            increase[best] = (measure(without(best)) - loss) / sizes[best]
            fresh.add(best)
            looks += 1
            best = min(fitting, key=increase.__getitem__)
        if best not in fresh:
            best = min(fresh.intersection(fitting), key=increase.__getitem__)
        loss += increase[best] * sizes[best]
        masks = without(best)
        left.remove(best)
        removed += sizes[best]
        fresh = set()
