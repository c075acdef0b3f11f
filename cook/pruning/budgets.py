"""Budgets: the sparsity targets of consecutive gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from math import lcm
from typing import Any, Literal, get_args

import torch

from cook.base.errors import UserError
from cook.config.kinds import FINE, NAMES, Kind
from cook.config.scheme import Scope
from cook.pruning.block_times import BlockTimes, TimePricing, WholeTimePricing
from cook.pruning.controller import Constraint
from cook.pruning.count_pricing import CountPricing, count_pricing
from cook.pruning.counts import (
    Kept,
    cache_features,
    forward_flops,
    parameters,
    unit_cache_features,
    unit_flops,
    unit_parameters,
)
from cook.pruning.units import WIDE, PruningSpace, UnitGroup

MIB = 1 << 20
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The order of groups in the flat vector of gates."""
Cost = Literal["units", "parameters", "flops", "bytes", "ms"]
"""What a budget counts: units, parameters, FLOPs per token, bytes of weights and cache, or measured milliseconds."""
Keep = Mapping[str, float]
"""What to keep, by a name of `KEEP_KEYS`: a share, a number of heads or FFN dimensions, or MiB or milliseconds."""
WHOLE_KEYS = ("params", "flops", "memory_mib", "latency_ms")
"""The names of budgets for all units together."""
KEEP_KEYS = (*WHOLE_KEYS, *(names.option for names in NAMES.values()))
NUMBERS = tuple(names.option for names in FINE.values())
"""The names whose values may be numbers of units."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the pruned model keeps."""

    blocks: float | None = None
    """Share of the blocks' parameters; required where blocks have gates."""
    kept: dict[Kind, int | float] = field(default_factory=dict)
    """Heads, experts and FFN dimensions (of an expert) that each block keeps, if all keep equally many, dimensions per
    head, and hidden dimensions: number (int) or share (float)."""
    scope: Scope = "block"
    """`block`: each block has its own budget; `global`: one budget for all units with gates, but for blocks with a
    target of their own."""
    cost: Cost = "units"
    """What the global budget counts."""
    share: float | None = None
    """Share of the global budget's costs to keep; None: the share that follows from `limit` or `kept`. With blocks,
    head or hidden dimensions the budget covers the whole model."""
    limit: float | None = None
    """Bytes or milliseconds of the whole pruned model."""
    before: Kept = field(default_factory=dict)
    """Units that fixed masks leave, by group name, for `limit`."""
    context: int = 0
    """Number of keys to which a query attends: the mean for FLOPs, the length of the cache for bytes."""
    number_bytes: int = 2
    """Bytes per weight and per cached feature."""
    times: BlockTimes | None = None
    """The measured times, where milliseconds are counted."""
    round_to: int = 1
    """The numbers of FFN dimensions and of hidden dimensions that stay are multiples of it."""

    def kept_share(self, group: UnitGroup) -> float:
        """The share of its units that `group` keeps if all blocks keep equally many.

        Raises:
            UserError: more or fewer than are possible.
        """
        kept = 1.0 if group.kind == "keys" else self.kept.get(group.kind, 1.0)
        if not (group.is_even or group.least):
            return kept / group.counted if isinstance(kept, int) else kept
        # Experts, and the dimensions inside them: the same whole number in every section.
        sections = group.sections if group.kind == "experts" else 1
        size, step = group.counted // sections, lcm(group.multiple, self.round_to if group.kind == "dimff" else 1)
        wanted = kept / sections if isinstance(kept, int) else kept * size
        number = min(size, step * max(1, round(wanted / step)))
        if number < group.least or (isinstance(kept, int) and number != wanted):
            raise UserError(
                f"{'experts' if group.kind == 'experts' else 'dims of an expert'}: {kept} cannot be kept",
                wanted=f"{max(group.least, step) * sections} to {size * sections}"
                + (f", a multiple of {step * sections}" if step * sections > 1 else ""),
                remedy="each token needs that many experts" if group.kind == "experts" else None,
            )
        return number / size


def constraints(space: PruningSpace, learned: Sequence[UnitGroup], targets: Targets) -> list[Constraint]:
    """Returns one constraint over all blocks, by their parameters, and the constraints of the other units.

    With scope `block`, each block has one constraint per kind of unit (one per section if the block has sections), by
    the number of units, and so have head and hidden dimensions. With scope `global`, all of them share one constraint,
    and so do blocks without a target of their own.

    Args:
        space: The model's space.
        learned: Groups with gates, in the order of the flat vector of gates: blocks, heads, dims, hidden dimensions.
        targets: What the model keeps.
    """
    blocks = [group for group in learned if group.kind == "layer" and targets.blocks is not None]
    inner = [group for group in learned if group not in blocks]
    made: list[Constraint] = []
    if blocks:
        assert targets.blocks is not None
        made.append(_constraint("blocks", blocks, [unit_parameters(space, group) for group in blocks], targets.blocks))
    if inner and targets.scope == "global":
        made.append(_shared(space, inner, targets))
    else:
        made += [constraint for group in inner for constraint in _of_block(group, targets)]
    starts = accumulate((len(constraint.costs) for constraint in made), initial=0)
    return [replace(constraint, start=start) for constraint, start in zip(made, starts, strict=False)]


def _constraint(
    name: str, groups: Sequence[UnitGroup], costs: Sequence[float], share: float, **more: Any
) -> Constraint:
    """A constraint on gates of these groups with these costs, which keep `share` of their sum."""
    total, names = sum(costs), tuple(group.name for group in groups)
    return Constraint(
        name=name, start=0, groups=names, costs=tuple(cost / total for cost in costs), target=1.0 - share, **more
    )


def _of_all(
    name: str, groups: Sequence[UnitGroup], costs: Sequence[float], share: float, targets: Targets, **more: Any
) -> Constraint:
    """A constraint on all gates of these groups."""
    multiples, least = _multiples(groups, targets), _least(groups, targets)
    return _constraint(
        name, groups, costs, share, multiples=multiples, least=least, kinds=_kinds(groups), early=_early(groups), **more
    )


def _multiple(group: UnitGroup, targets: Targets) -> int:
    return lcm(group.multiple, targets.round_to) if group.kind in ("dimff", "hidden") else 1


def _multiples(groups: Sequence[UnitGroup], targets: Targets) -> tuple[tuple[int, int], ...]:
    found = tuple((group.size, _multiple(group, targets)) for group in groups)
    return found if any(multiple > 1 for _, multiple in found) else ()


def _least(groups: Sequence[UnitGroup], targets: Targets) -> tuple[tuple[int, int], ...]:
    """As in `Constraint.least`. A model without hidden dimensions, or with heads of none, cannot be built."""
    least = [(group.size, _multiple(group, targets) if group.kind in WIDE else group.least) for group in groups]
    return tuple(least) if any(number for _, number in least) else ()


def _kinds(groups: Sequence[UnitGroup]) -> tuple[int, ...]:
    """As in `Constraint.kinds`."""
    return tuple(KINDS.index(group.kind) for group in groups for _ in range(group.size))


def _early(groups: Sequence[UnitGroup]) -> tuple[bool, ...]:
    """As in `Constraint.early`: in a budget of several kinds of units, all but the FFN dimensions."""
    if len({group.kind for group in groups} - {"keys"}) == 1:
        return ()
    return tuple(group.kind != "dimff" for group in groups for _ in range(group.size))


def _of_block(group: UnitGroup, targets: Targets) -> list[Constraint]:
    kept = targets.kept_share(group)
    if group.sections == 1 or group.section_sizes:
        rest = {"multiples": _multiples([group], targets), "least": _least([group], targets)}
        return [_constraint(group.name, [group], [1.0] * group.size, kept, **rest)]
    return [_constraint(f"{group.name}.{n}", [group], [1.0] * size, kept) for n, size in enumerate(group.spans)]


def unit_cost(space: PruningSpace, group: UnitGroup, targets: Targets) -> float:
    """The cost of one unit of `group` in a global budget."""
    if targets.cost == "ms":
        assert targets.times is not None, "milliseconds are counted and no times are given"
        return targets.times.curve(group).ms[-1] / group.size
    if targets.cost == "flops":
        return float(unit_flops(space, group, context=targets.context))
    if targets.cost == "bytes":
        numbers = unit_parameters(space, group) + unit_cache_features(group) * targets.context
        return float(targets.number_bytes * numbers)
    return float(unit_parameters(space, group) if targets.cost == "parameters" else group.members)


def _shared(space: PruningSpace, groups: Sequence[UnitGroup], targets: Targets) -> Constraint:
    if is_coupled(groups) and targets.cost != "units":
        return _shared_by_all(space, groups, targets)
    each = [unit_cost(space, group, targets) for group in groups]
    costs = [cost for group, cost in zip(groups, each, strict=True) for _ in range(group.size)]
    share = targets.share
    if targets.limit is not None:
        share = _share_of_limit(space, groups, targets, sum(costs))
    elif share is None:
        even = sum(targets.kept_share(group) * group.size * cost for group, cost in zip(groups, each, strict=True))
        share = even / sum(costs)
    pricing = None
    if targets.times is not None:
        _check_measured(groups)
        curves = tuple(targets.times.curve(group) for group in groups)
        pricing = TimePricing(sizes=tuple(group.size for group in groups), curves=curves)
    kinds = {group.kind for group in groups} - {"keys"}
    name = "heads and dims" if len(kinds) > 1 else groups[0].kind
    return _of_all(name, groups, costs, share, targets, owners=_owners(space, groups), pricing=pricing)


def _check_measured(groups: Sequence[UnitGroup]) -> None:
    if any(group.kind == "experts" for group in groups):
        raise UserError(
            "target_latency: the times of experts are not measured",
            remedy="set another budget, such as target_memory",
        )
    if any(group.kind == "keys" for group in groups):
        raise UserError(
            "target_latency: the units of attention must be whole key-value groups, which are what was measured",
            remedy='set fine-grained.head_unit to "auto" or "kv_group"',
        )


def is_coupled(groups: Sequence[UnitGroup]) -> bool:
    """Whether what a unit costs depends on others, so that one budget covers the whole model."""
    return any(group.kind == "layer" or group.kind in WIDE for group in groups)


def _shared_by_all(space: PruningSpace, groups: Sequence[UnitGroup], targets: Targets) -> Constraint:
    """One budget for the whole model: what a unit costs depends on how many others there are."""
    owners = _owners(space, groups)
    pricing: CountPricing | WholeTimePricing
    if targets.times is not None:
        if lacking := [g.kind for g in groups if g.kind in WIDE and g.kind not in targets.times.wide]:
            raise UserError(
                f"target_latency: the table has no times for several numbers of {lacking[0]}",
                remedy="measure it again with `cook profile`, or leave these units out of the budget",
            )
        _check_measured(groups)
        before = targets.before
        pricing = WholeTimePricing(space=space, groups=tuple(groups), owners=owners, times=targets.times, before=before)
    else:
        pricing = count_pricing(space, groups, owners, partial(_cost_with, space, targets))
    share = targets.share
    if targets.limit is not None:
        share = targets.limit / pricing.whole
    elif share is None:
        kept = {group.name: round(targets.kept_share(group) * group.size) for group in groups}
        share = whole_cost(space, targets, kept) / pricing.whole
    if not 0 < share <= 1:
        amount, most = f"{share:.4g} of the whole model's {targets.cost}", "1"
        if targets.limit is not None:
            unit, scale = ("MiB", MIB) if targets.cost == "bytes" else ("ms", 1)
            amount, most = f"{targets.limit / scale:.4g} {unit}", f"{pricing.whole / scale:.4g} {unit}"
        raise UserError(f"the budget of {amount} cannot be reached", wanted=f"above 0 and up to {most}")
    costs = pricing.linearised(torch.ones(sum(pricing.sizes), dtype=torch.float64))[0].tolist()
    return _of_all("all units", groups, costs, share, targets, owners=owners, pricing=pricing)


def _cost_with(space: PruningSpace, targets: Targets, kept: Kept) -> float:
    return whole_cost(space, targets, {**targets.before, **kept})


def _owners(space: PruningSpace, groups: Sequence[UnitGroup]) -> tuple[int, ...]:
    """`Constraint.owners` of one budget for these groups; empty if no group's owner has gates."""
    ends = list(accumulate(group.size for group in groups))
    starts = {group.name: end - group.size for group, end in zip(groups, ends, strict=True)}
    owners: list[int] = []
    for group in groups:
        keys = space.keys_of(group)
        block = "" if group.kind == "layer" or group.kind in WIDE else space.block(group).name
        if keys is not None and keys.name in starts:
            owners += [starts[keys.name] + n for n, size in enumerate(group.spans) for _ in range(size)]
        else:
            owners += [starts.get(block, -1)] * group.size
    return tuple(owners) if max(owners) >= 0 else ()


def _share_of_limit(space: PruningSpace, groups: Sequence[UnitGroup], targets: Targets, prunable: float) -> float:
    """The share of the groups' costs that stays if the whole model ends at `targets.limit`."""
    assert targets.limit is not None
    whole = whole_cost(space, targets, targets.before)
    share = 1 - (whole - targets.limit) / prunable
    least = sum(unit_cost(space, group, targets) * group.least for group in groups) / prunable
    if not least < share <= 1:
        unit, scale = ("MiB", MIB) if targets.cost == "bytes" else ("ms", 1)
        raise UserError(
            f"the budget of {targets.limit / scale:.4g} {unit} cannot be reached with {_named(groups)}",
            wanted=f"above {(whole - prunable * (1 - least)) / scale:.4g} and up to {whole / scale:.4g} {unit}",
        )
    return share


def _named(groups: Sequence[UnitGroup]) -> str:
    """The kinds of units in words; keys and values go with heads."""
    kinds = [names.plural for kind, names in NAMES.items() if any(group.kind == kind for group in groups)]
    return " and ".join(kinds) or "these units"


def whole_cost(space: PruningSpace, targets: Targets, kept: Kept) -> float:
    """Parameters, FLOPs per token, bytes or milliseconds of the whole model with the units in `kept`."""
    if targets.cost == "ms":
        assert targets.times is not None
        return targets.times.total(space, kept)
    if targets.cost == "parameters":
        return float(parameters(space, kept))
    if targets.cost == "flops":
        return forward_flops(space, kept, context=targets.context)
    numbers = parameters(space, kept) + cache_features(space, kept) * targets.context
    return float(targets.number_bytes * numbers)


def whole_budget(space: PruningSpace, learned: Sequence[UnitGroup], cost: Cost, share: float, context: int) -> Targets:
    """One budget over all groups, so that the model keeps `share` of its parameters or FLOPs.

    Raises:
        UserError: removing these units alone cannot reach `share`.
    """
    targets = Targets(scope="global", cost=cost, context=context)
    count = parameters if cost == "parameters" else partial(forward_flops, context=context)
    whole = count(space)
    if is_coupled(learned):
        fewest = {g.name: g.multiple if g.kind in WIDE else g.least * g.sections for g in learned}
        removable = whole - count(space, fewest)
    else:
        removable = sum(unit_cost(space, group, targets) * (group.size - group.least) for group in learned)
    removed = (1 - share) * whole
    if removed >= removable:
        key = "params" if cost == "parameters" else "flops"
        raise UserError(
            f"keep: {key}={share:g} cannot be reached with {_named(learned)} alone",
            wanted=f"more than {1 - removable / whole:.2f}",
            remedy='keep more, or let other units go too (units "all")',
        )
    if is_coupled(learned):
        return replace(targets, share=share)
    prunable = sum(unit_cost(space, group, targets) * group.size for group in learned)
    return replace(targets, share=1.0 - removed / prunable)


def check_keep(keep: Keep) -> None:
    """Checks the values of `keep`.

    Raises:
        UserError: an unknown name, a value out of range, or a whole-model budget together with other targets.
    """
    unknown = sorted(set(keep) - set(KEEP_KEYS))
    if unknown or not keep:
        raise UserError(f"keep: {'unknown ' + unknown[0] if unknown else 'is empty'}", wanted=", ".join(KEEP_KEYS))
    for key in WHOLE_KEYS:
        if key in keep and len(keep) > 1:
            raise UserError(f"keep: {key} is a budget for all units", remedy="use it without other keys")
    for key, value in keep.items():
        if not isinstance(value, int | float):
            remedy = "for several sizes, use cook.learn_nested_masks" if isinstance(value, list | tuple) else None
            raise UserError(f"keep: {key}", wanted="a number", got=repr(value)[:80], remedy=remedy)
        is_number = isinstance(value, int) and key in NUMBERS
        is_absolute = key in ("memory_mib", "latency_ms")
        if not (value > 0 if is_absolute else value >= 1 if is_number else 0 < value <= 1):
            share = "a share above 0 and up to 1.0, or a number of heads, experts, dims, head dims or hidden dims"
            raise UserError(f"keep: {key}={value}", wanted="above 0" if is_absolute else share)
