"""The attention units of a scheme, and whether the family can reach its targets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import lcm
from typing import Any

from cook.base.errors import UserError
from cook.config.kinds import NAMES, Kind
from cook.config.scheme import HeadUnitChoice
from cook.config.types import FineConfig
from cook.pruning.budgets import KINDS
from cook.pruning.family import Adapter
from cook.pruning.mask_set import WIDE_NAMES
from cook.pruning.units import HeadUnit, PruningSpace, UnitGroup

BUDGET_UNITS: dict[str, Kind] = {names.option: kind for kind, names in NAMES.items()}
"""The kinds of units that one budget can have, by their names for users."""
HOW: dict[HeadUnit, str] = {
    "kv_group": "whole key-value groups",
    "query_head": "the same number of query heads per group",
}


def choose_head_unit(
    adapter: Adapter,
    config: Mapping[str, Any],
    fine: FineConfig | None,
    *,
    uneven: bool = False,
    one_budget: bool = False,
) -> HeadUnit:
    """Returns the unit that the scheme names, or the first unit that can reach its target.

    Args:
        adapter: The family.
        config: The model's config.
        fine: The scheme's section; None if neither heads nor FFN dimensions are pruned.
        uneven: Whether blocks share a number of heads. They then lose whole key-value groups, which frees more
            parameters per head, unless all query heads form one group.
        one_budget: Whether heads and FFN dimensions share a budget of parameters or FLOPs. Query heads are then units,
            and so are the keys that no query head reads any more.
    """
    units = adapter.head_units(config)
    if fine is None or len(units) == 1:
        return units[0]
    if fine.head_unit != "auto":
        return fine.head_unit
    if one_budget:
        return units[-1]
    if uneven:
        return "query_head" if _has_one_section(adapter.space(config, "query_head")) else "kv_group"
    for unit in units:
        if fine.target_num_heads in reachable_heads(adapter, config, unit, fine.allow_remote_code):
            return unit
    return units[0]


def reachable_heads(
    adapter: Adapter, config: Mapping[str, Any], unit: HeadUnit, allow_remote_code: bool
) -> tuple[int, ...]:
    """Numbers of query heads that every block can end with: whole units, and a class that can load the result."""
    group = next((g for g in adapter.space(config, unit).groups if g.kind == "heads"), None)
    if group is None:
        return ()
    found = []
    for kept in sorted({n * group.sections for n in range(1, min(group.spans) + 1)} | {group.size}):
        heads, kv_heads = group.heads(kept)
        if allow_remote_code or adapter.stock_holds(config, heads, kv_heads):
            found.append(heads)
    return tuple(found)


def check_sizes(
    adapter: Adapter,
    config: Mapping[str, Any],
    space: PruningSpace,
    fine: FineConfig | None,
    uneven: Collection[str] = (),
    *,
    keeps_heads: bool = False,
) -> None:
    """Checks that a scheme fits the model and that the family can reach its targets.

    Args:
        adapter: The family.
        config: The model's config.
        space: The model's space.
        fine: The scheme's section; None if neither heads nor FFN dimensions are pruned.
        uneven: Kinds of units for which blocks share a budget.
        keeps_heads: Whether no stage prunes heads, whatever their target.

    Raises:
        UserError: names the model's sizes, or the possible targets.
    """
    if fine is None:
        return
    before = {"heads": ("num_heads", fine.num_heads), "dimff": ("dim_ff", fine.dim_ff)}
    after = {"heads": fine.target_num_heads, "dimff": fine.target_dimff}
    for kind, (key, whole) in before.items():
        sizes = sorted({group.counted for group in space.groups if group.kind == kind})
        if sizes and sizes[-1] != whole:
            raise UserError(
                f"fine-grained.{key} differs from the model's",
                wanted=f"{sizes[-1]}" + (", that of the largest block" if len(sizes) > 1 else ""),
                got=whole,
                remedy=f"set {key} to the size before pruning",
            )
        if len(sizes) > 1 and kind not in uneven and after[kind] != whole:
            raise UserError(
                f"the blocks of this model have different numbers of {'heads' if kind == 'heads' else 'FFN dimensions'}"
                ", of which one number cannot be a target for all",
                got=", ".join(map(str, sizes)),
                remedy="use one budget for the whole model: `--keep params=…`, or a joint stage with scope global",
            )
    _check_head_dim(space, fine.target_head_dim)
    hidden = fine.target_hidden
    if hidden is not None and space.hidden is not None and hidden > space.hidden.size:
        most = f"at most {space.hidden.size}"
        raise UserError("fine-grained.target_hidden: above the hidden size", wanted=most, got=hidden)
    if fine.target_experts is not None and not any(group.kind == "experts" for group in space.groups):
        raise no_experts(adapter)
    if "dimff" in uneven and fine.scope == "global" and any(group.is_even for group in space.of("dimff")):
        raise UserError(
            'fine-grained.scope "global": the dims of experts have one number per block',
            remedy='set the scope to "block", or prune whole experts',
        )
    heads = next((group for group in space.groups if group.kind == "heads"), None)
    if uneven and adapter.abilities.is_stock and not fine.allow_remote_code:
        raise UserError(
            'scope "global": no stock class can load blocks of different sizes',
            remedy="set fine-grained.allow_remote_code to true (do_prune.py --uniform can pad the result)",
        )
    if heads is not None and "heads" not in uneven and fine.target_num_heads != fine.num_heads:
        _check_heads(adapter, config, heads, fine)
    head_dim, is_free = fine.target_head_dim, uneven or fine.allow_remote_code
    if heads is not None and (hidden, head_dim) != (None, None) and not is_free:
        units = heads.size if keeps_heads else fine.target_num_heads // heads.members
        number = heads.heads(units)
        if head_dim is not None and not adapter.stock_holds(config, *number, hidden, head_dim):
            raise UserError(
                "fine-grained.target_head_dim: no stock class can load heads of this size",
                got=head_dim,
                remedy="set fine-grained.allow_remote_code to true, or leave target_head_dim out",
            )
        if hidden is not None and not adapter.stock_holds(config, *number, hidden, head_dim):
            raise UserError(
                "fine-grained.target_hidden: no stock class can load this hidden size",
                wanted="a multiple of the number of heads"
                if adapter.abilities.stock_heads
                else "the number of heads that stay, times their size",
                got=hidden,
                remedy="set another target_hidden, or fine-grained.allow_remote_code to true",
            )


def _check_head_dim(space: PruningSpace, wanted: int | None) -> None:
    group = space.head_dims
    if wanted is None or group is None:
        return
    size = group.size * group.members
    if wanted > size or wanted % group.members:
        pairs = ", an even number: rotary positions turn pairs" if group.members > 1 else ""
        raise UserError("fine-grained.target_head_dim: not possible", wanted=f"at most {size}{pairs}", got=wanted)


def budget_kinds(space: PruningSpace, units: Collection[str], pin: Collection[str], hidden: bool) -> tuple[Kind, ...]:
    """The kinds of units of one budget for the whole model, in the order of their gates.

    Args:
        space: The model's space.
        units: Names of `BUDGET_UNITS`, or `all` of those that the model has; empty: heads, experts and dims.
        pin: Names of those that stay.
        hidden: Whether hidden dimensions are among them too.

    Raises:
        UserError: an unknown name, or no units are left.
    """
    names = BUDGET_UNITS if "all" in units else {*units} or {"heads", "experts", "dims"}
    for option, given in (("units", names), ("pin", pin)):
        if strange := sorted({*given} - {*BUDGET_UNITS}):
            wanted = ", ".join(BUDGET_UNITS) + (", or all" if option == "units" else "")
            remedy = f"repeat --{option} for several" if "," in strange[0] else None
            raise UserError(f"--{option} {strange[0]}: there are no such units", wanted=wanted, remedy=remedy)
    chosen = {BUDGET_UNITS[name] for name in ({*names, *(["hidden"] if hidden else [])} - {*pin})}
    if "all" in units or not units:
        is_even = {group.kind for group in space.every if group.is_even}  # sections must keep the same number
        chosen = {kind for kind in chosen if kind not in is_even and (space.of(kind) or kind == "hidden")}
    if not chosen:
        raise UserError("all units are pinned, and nothing is left to prune", remedy="pin fewer units")
    return tuple(kind for kind in KINDS if kind in chosen or (kind == "keys" and "heads" in chosen))


def heads_stay(adapter: Adapter) -> UserError:
    """The error for a model whose heads cannot be pruned."""
    return UserError(
        f"the heads of this {adapter.family} model cannot be pruned: every head has modules of its own",
        remedy="prune its FFN dimensions, hidden size or layers",
    )


def size_stays(adapter: Adapter, kind: Kind) -> UserError:
    """The error for a model whose hidden size or size of heads cannot be pruned."""
    return UserError(
        f"{WIDE_NAMES[kind]} of this {adapter.family} model cannot be pruned",
        remedy="prune its heads, FFN dimensions or layers",
    )


def nearest_head_dim(adapter: Adapter, space: PruningSpace, wanted: float) -> int:
    """A number of dimensions per head: `wanted` itself, or for a share the nearest number of whole units.

    Raises:
        UserError: the number cannot be reached, or the size of heads must stay.
    """
    group = space.head_dims
    if group is None:
        raise size_stays(adapter, "head_dims")
    size = group.size * group.members
    if isinstance(wanted, int):
        if wanted > size or wanted % group.members:
            even = ", an even number" if group.members > 1 else ""
            raise UserError(f"keep: head_dims={wanted} cannot be reached", wanted=f"at most {size}{even}")
        return wanted
    return group.members * max(1, round(wanted * group.size))


def no_experts(adapter: Adapter) -> UserError:
    """The error for a model without experts."""
    return UserError(
        f"this {adapter.family} model has no experts", remedy="prune its heads, FFN dimensions, hidden size or layers"
    )


def nearest_hidden(
    adapter: Adapter, config: Mapping[str, Any], space: PruningSpace, wanted: float, round_to: int
) -> int:
    """A number of hidden dimensions: `wanted` itself, or for a share the nearest number.

    Of numbers within 1/16 of the hidden size, one that a stock class can load is preferred.

    Raises:
        UserError: the number is above the hidden size or not a multiple of `round_to`, or the hidden size must stay.
    """
    if space.hidden is None:
        raise size_stays(adapter, "hidden")
    size, round_to = space.hidden.size, lcm(round_to, space.hidden.multiple)
    if isinstance(wanted, int):
        if wanted > size or wanted % round_to:
            multiple = f", a multiple of {round_to}" if round_to > 1 else ""
            raise UserError(f"keep: hidden={wanted} cannot be reached", wanted=f"at most {size}{multiple}")
        return wanted
    numbers = sorted({*range(round_to, size + 1, round_to), size}, key=lambda number: abs(number - wanted * size))
    near = [number for number in numbers if abs(number - wanted * size) <= size / 16]
    heads = next(iter(space.of("heads")), None)
    if heads is None or not adapter.abilities.stock_heads:
        return numbers[0]
    now = heads.heads(heads.size)
    return next((number for number in near if adapter.stock_holds(config, *now, number)), numbers[0])


def _has_one_section(space: PruningSpace) -> bool:
    return all(group.sections == 1 for group in space.of("heads"))


def _check_heads(adapter: Adapter, config: Mapping[str, Any], group: UnitGroup, fine: FineConfig) -> None:
    if fine.target_num_heads in reachable_heads(adapter, config, group.head_unit, fine.allow_remote_code):
        return
    units = adapter.head_units(config) if fine.head_unit == "auto" else (group.head_unit,)
    choices = {u: reachable_heads(adapter, config, u, fine.allow_remote_code) for u in units}
    texts = [", ".join(map(str, c)) + (f" ({HOW[u]})" if len(units) > 1 else "") for u, c in choices.items()]
    by_code = sorted({h for u in units for h in reachable_heads(adapter, config, u, True)})
    others = {
        remote: {h for u in adapter.head_units(config) for h in reachable_heads(adapter, config, u, remote)}
        for remote in (fine.allow_remote_code, True)
    }
    remedy = None
    if fine.target_num_heads in by_code:
        remedy = f"set allow_remote_code for any of {', '.join(map(str, by_code))}"
    elif fine.target_num_heads in others[fine.allow_remote_code]:
        remedy = 'set head_unit to "auto"'
    elif fine.target_num_heads in others[True]:
        remedy = 'set head_unit to "auto" and allow_remote_code to true'
    raise UserError(
        "fine-grained.target_num_heads: not possible in this family",
        wanted="; or ".join(texts),
        got=fine.target_num_heads,
        remedy=remedy,
    )


def offered_units(adapter: Adapter, config: Mapping[str, Any], choice: HeadUnitChoice) -> tuple[HeadUnit, ...]:
    """The kinds of attention units to choose from; where query heads do not share keys there is only one kind."""
    units = adapter.head_units(config)
    return tuple(unit for unit in units if choice in ("auto", unit)) or units


def nearest_heads(
    adapter: Adapter, config: Mapping[str, Any], wanted: float, choice: HeadUnitChoice = "auto"
) -> tuple[HeadUnit, int]:
    """The unit and number of heads nearest to `wanted`; among equally near ones, one that a stock class can load.

    Args:
        adapter: The family.
        config: The model's config.
        wanted: A share (float) or a number (int) of query heads per block.
        choice: The unit, or `auto` for any.

    Raises:
        UserError: no units add up to the number.
    """
    choices: list[tuple[bool, int, HeadUnit]] = []
    for unit in offered_units(adapter, config, choice):
        stock = reachable_heads(adapter, config, unit, False)
        choices += [(number not in stock, number, unit) for number in reachable_heads(adapter, config, unit, True)]
    numbers = sorted({number for _, number, _ in choices})
    if not numbers:
        raise heads_stay(adapter)
    goal = wanted if isinstance(wanted, int) else wanted * numbers[-1]
    _, nearest, unit = min(choices, key=lambda choice: (abs(choice[1] - goal), choice[0]))
    if isinstance(wanted, int) and nearest != wanted:
        raise UserError(f"keep: heads={wanted} cannot be reached", wanted=", ".join(map(str, numbers)))
    return unit, nearest
