"""The attention units of a scheme, and whether the family can reach its targets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cook.base.errors import UserError
from cook.config.scheme import HeadUnitChoice
from cook.config.types import FineConfig
from cook.pruning.family import Adapter
from cook.pruning.units import HeadUnit, PruningSpace, UnitGroup

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
    for kept in range(1, group.section_size + 1):
        heads, kv_heads = group.heads(kept * group.sections)
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
    for kind, key, wanted in (("heads", "num_heads", fine.num_heads), ("dimff", "dim_ff", fine.dim_ff)):
        sizes = sorted({group.size * group.members for group in space.groups if group.kind == kind})
        if sizes and sizes != [wanted]:
            raise UserError(
                f"fine-grained.{key} differs from the model's",
                wanted=", ".join(map(str, sizes)),
                got=wanted,
                remedy=f"set {key} to the size before pruning",
            )
    hidden = fine.target_hidden
    if hidden is not None and space.hidden is not None and hidden > space.hidden.size:
        most = f"at most {space.hidden.size}"
        raise UserError("fine-grained.target_hidden: above the hidden size", wanted=most, got=hidden)
    heads = next((group for group in space.groups if group.kind == "heads"), None)
    if uneven and adapter.abilities.is_stock and not fine.allow_remote_code:
        raise UserError(
            'scope "global": no stock class can load blocks of different sizes',
            remedy="set fine-grained.allow_remote_code to true (do_prune.py --uniform can pad the result)",
        )
    if heads is not None and "heads" not in uneven and fine.target_num_heads != fine.num_heads:
        _check_heads(adapter, config, heads, fine)
    if heads is not None and hidden is not None and not uneven and not fine.allow_remote_code:
        units = heads.size if keeps_heads else fine.target_num_heads // heads.members
        if not adapter.stock_holds(config, *heads.heads(units), hidden):
            raise UserError(
                "fine-grained.target_hidden: no stock class can load this hidden size",
                wanted="a multiple of the number of heads"
                if adapter.abilities.stock_heads
                else "the number of heads that stay, times their size",
                got=hidden,
                remedy="set another target_hidden, or fine-grained.allow_remote_code to true",
            )


def heads_stay(adapter: Adapter) -> UserError:
    """The error for a model whose heads cannot be pruned."""
    return UserError(
        f"the heads of this {adapter.family} model cannot be pruned: every head has modules of its own",
        remedy="prune its FFN dimensions, hidden size or layers",
    )


def hidden_stays(adapter: Adapter) -> UserError:
    """The error for a model whose hidden size cannot be pruned."""
    return UserError(
        f"the hidden size of this {adapter.family} model cannot be pruned",
        remedy="prune its heads, FFN dimensions or layers",
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
        raise hidden_stays(adapter)
    size = space.hidden.size
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
