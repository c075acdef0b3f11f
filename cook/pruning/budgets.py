"""Budgets: the sparsity targets of consecutive gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

from cook.base.errors import UserError
from cook.config.scheme import Scope
from cook.pruning.controller import Constraint
from cook.pruning.counts import forward_flops, parameters, unit_flops, unit_parameters
from cook.pruning.units import Kind, PruningSpace, UnitGroup

KINDS: tuple[Kind, ...] = ("layer", "heads", "keys", "dimff")
"""The order of groups in the flat vector of gates."""
Cost = Literal["units", "parameters", "flops"]
"""What a budget counts: parameters, FLOPs or units."""
Keep = Mapping[str, float]
"""What to keep, by a name of `KEEP_KEYS`: a share, or a number of heads or FFN dimensions."""
KEEP_KEYS = ("params", "flops", "blocks", "heads", "dims")
Budget = tuple[str, Sequence[float], float, tuple[int, ...]]
"""Name, cost of each unit, the share of the total cost to remove, and the owners (`Constraint.owners`)."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the pruned model keeps."""

    blocks: float | None = None
    """Share of the blocks' parameters; required where blocks have gates."""
    kept: dict[Kind, int | float] = field(default_factory=dict)
    """Heads and FFN dimensions that each block keeps, if all keep equally many: number (int) or share (float)."""
    scope: Scope = "block"
    """`block`: each block has its own budget; `global`: one budget for the heads and FFN dimensions of all blocks."""
    cost: Cost = "units"
    """What the global budget counts."""
    share: float | None = None
    """Share of the global budget's costs to keep; None: the share that follows from `kept`."""
    context: int = 0
    """Mean number of keys to which a query attends; used to count FLOPs."""

    def kept_share(self, group: UnitGroup) -> float:
        """The share of its units that `group` keeps if all blocks keep equally many."""
        kept = 1.0 if group.kind == "keys" else self.kept[group.kind]
        return kept / (group.size * group.members) if isinstance(kept, int) else kept


def constraints(space: PruningSpace, learned: Sequence[UnitGroup], targets: Targets) -> list[Constraint]:
    """Returns one constraint over all blocks, by their parameters, and the constraints of heads and FFN dimensions.

    With scope `block`, each block has one constraint per kind of unit (one per section if the block has sections), by
    the number of units. With scope `global`, the heads and FFN dimensions of all blocks share one constraint.

    Args:
        space: The model's space.
        learned: Groups with gates, in the order of the flat vector of gates: blocks, then heads, then dims.
        targets: What the model keeps.
    """
    groups = {kind: [group for group in learned if group.kind == kind] for kind in KINDS}
    budgets: list[Budget] = []
    if groups["layer"]:
        assert targets.blocks is not None, "blocks have gates and no target"
        sizes = [float(unit_parameters(space, group)) for group in groups["layer"]]
        budgets.append(("blocks", sizes, 1.0 - targets.blocks, ()))
    inner = groups["heads"] + groups["keys"] + groups["dimff"]
    if inner and targets.scope == "global":
        budgets.append(_shared(space, inner, targets))
    else:
        budgets += [budget for group in inner for budget in _of_block(group, targets.kept_share(group))]
    made, start = [], 0
    for name, costs, target, owners in budgets:
        shares = tuple(cost / sum(costs) for cost in costs)
        made.append(Constraint(name=name, start=start, costs=shares, target=target, owners=owners))
        start += len(costs)
    return made


def _of_block(group: UnitGroup, kept: float) -> list[Budget]:
    if group.sections == 1 or group.section_sizes:
        return [(group.name, [1.0] * group.size, 1.0 - kept, ())]
    return [(f"{group.name}.{n}", [1.0] * size, 1.0 - kept, ()) for n, size in enumerate(group.spans)]


def unit_cost(space: PruningSpace, group: UnitGroup, targets: Targets) -> float:
    """The cost of one unit of `group` in a global budget."""
    if targets.cost == "flops":
        return float(unit_flops(space, group, context=targets.context))
    return float(unit_parameters(space, group) if targets.cost == "parameters" else group.members)


def _shared(space: PruningSpace, groups: Sequence[UnitGroup], targets: Targets) -> Budget:
    each = [unit_cost(space, group, targets) for group in groups]
    costs = [cost for group, cost in zip(groups, each, strict=True) for _ in range(group.size)]
    share = targets.share
    if share is None:
        even = sum(targets.kept_share(group) * group.size * cost for group, cost in zip(groups, each, strict=True))
        share = even / sum(costs)
    kinds = {group.kind for group in groups} - {"keys"}
    return "heads and dims" if len(kinds) > 1 else groups[0].kind, costs, 1.0 - share, _owners(space, groups)


def _owners(space: PruningSpace, groups: Sequence[UnitGroup]) -> tuple[int, ...]:
    """`Constraint.owners` of one budget for these groups; empty if no query head has learned keys."""
    ends = list(accumulate(group.size for group in groups))
    starts = {group.name: end - group.size for group, end in zip(groups, ends, strict=True)}
    owners: list[int] = []
    for group in groups:
        keys = space.keys_of(group)
        if keys is not None and keys.name in starts:
            owners += [starts[keys.name] + n for n, size in enumerate(group.spans) for _ in range(size)]
        else:
            owners += [-1] * group.size
    return tuple(owners) if max(owners) >= 0 else ()


def whole_budget(space: PruningSpace, learned: Sequence[UnitGroup], cost: Cost, share: float, context: int) -> Targets:
    """One budget over all heads and FFN dimensions, so that the model keeps `share` of its parameters or FLOPs.

    Raises:
        UserError: removing heads and FFN dimensions alone cannot reach `share`.
    """
    targets = Targets(scope="global", cost=cost, context=context)
    whole = parameters(space) if cost == "parameters" else forward_flops(space, context=context)
    prunable = sum(unit_cost(space, group, targets) * group.size for group in learned)
    removed = (1 - share) * whole
    if removed >= prunable:
        key = "params" if cost == "parameters" else "flops"
        raise UserError(
            f"keep: {key}={share:g} cannot be reached with heads and FFN dimensions alone",
            wanted=f"more than {1 - prunable / whole:.2f}",
        )
    return replace(targets, share=1.0 - removed / prunable)


def check_keep(keep: Keep) -> None:
    """Checks the values of `keep`.

    Raises:
        UserError: an unknown name, a value out of range, or a whole-model budget together with other targets.
    """
    unknown = sorted(set(keep) - set(KEEP_KEYS))
    if unknown or not keep:
        raise UserError(f"keep: {'unknown ' + unknown[0] if unknown else 'is empty'}", wanted=", ".join(KEEP_KEYS))
    for key in ("params", "flops"):
        if key in keep and len(keep) > 1:
            raise UserError(f"keep: {key} is a budget for all units", remedy="use it without other keys")
    for key, value in keep.items():
        is_number = isinstance(value, int) and key in ("heads", "dims")
        if not (value >= 1 if is_number else 0 < value <= 1):
            raise UserError(
                f"keep: {key}={value}", wanted="a share above 0 and up to 1.0, or a number of heads or dims"
            )
