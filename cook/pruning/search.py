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
MOST_EXCHANGED = 3
"""Removed units that a round of exchanges tries to put back."""
LEAST_GAIN = 1e-3
"""The decrease of the loss, in nats per token, for which units are exchanged."""


def search_blocks(
    measure: Measure, space: PruningSpace, blocks: Sequence[UnitGroup], target: float, *, unit: BlockUnit = "block"
) -> dict[str, torch.Tensor]:
    """Masks of blocks, 0 and 1 `[1]` by group name, that remove `target` of their parameters to the nearest unit.

    Each round removes the unit with the least increase of the loss per parameter. Then removed units are exchanged for
    others as long as that lowers the loss.

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

    def nearer(key: tuple[int, str]) -> bool:
        return abs(removed + sizes[key] - wanted) < abs(removed - wanted)

    def cheapest(keys: set[tuple[int, str]], fresh: set[tuple[int, str]]) -> tuple[int, str]:
        """The unit of the least increase per parameter; `fresh` are those measured under the present masks."""
        for _ in range(MOST_LOOKS):
            best = min(sorted(keys), key=increase.__getitem__)
            if best in fresh:
                return best
            increase[best] = (measure(without(best)) - loss) / sizes[best]
            fresh.add(best)
        return min(sorted(keys & fresh), key=increase.__getitem__)

    left, removed = set(units), 0
    loss = measure(masks)
    increase = {key: (measure(without(key)) - loss) / sizes[key] for key in sorted(units)}
    fresh = set(units)
    # Only a unit that brings the sum nearer to the target may go.
    while fitting := {key for key in left if nearer(key)}:
        best = cheapest(fitting, fresh)
        loss += increase[best] * sizes[best]
        masks, removed, fresh = without(best), removed + sizes[best], set()
        left.remove(best)

    # What went first may be worth more by now than what stayed: exchanges of one unit for another of its size.
    settled = False
    while not settled:
        settled, whole = True, (masks, loss)
        gone = sorted(set(units) - left)
        put_back = {key: masks | {group.name: torch.ones(1) for group in units[key]} for key in gone}
        gain = {key: loss - measure(put_back[key]) for key in gone}
        for key in sorted(gone, key=lambda key: -gain[key] / sizes[key])[:MOST_EXCHANGED]:
            others = {other for other in left if sizes[other] == sizes[key]}
            if not others:
                continue
            masks, loss = put_back[key], whole[1] - gain[key]
            best = cheapest(others, set())
            if loss + increase[best] * sizes[best] < whole[1] - LEAST_GAIN:
                loss += increase[best] * sizes[best]
                masks, settled = without(best), False
                left ^= {key, best}
                increase[key] = gain[key] / sizes[key]
                break
            masks, loss = whole
    return masks
