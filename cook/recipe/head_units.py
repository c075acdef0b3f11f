"""Which units of attention a scheme means, and whether the family can express its targets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cook.base.errors import UserError
from cook.config.types import FineConfig
from cook.pruning.family import Adapter
from cook.pruning.units import HeadUnit, PruningSpace, UnitGroup

HOW = {"kv_group": "whole key-value groups", "query_head": "as many query heads of every group"}


def choose_head_unit(
    adapter: Adapter, config: Mapping[str, Any], fine: FineConfig | None, *, uneven: bool = False
) -> HeadUnit:
    """The unit that the scheme names, or the first with which its target can be reached.

    Blocks that share a budget lose whole key-value groups, of which any may go; query heads only where all of them
    form one group.
    """
    units = adapter.head_units(config)
    if fine is None or len(units) == 1:
        return units[0]
    if fine.head_unit != "auto":
        return fine.head_unit
    if uneven:
        return "query_head" if _has_one_section(adapter.space(config, "query_head")) else "kv_group"
    for unit in units:
        if fine.target_num_heads in reachable_heads(adapter, config, unit, fine.allow_remote_code):
            return unit
    return units[0]


def reachable_heads(
    adapter: Adapter, config: Mapping[str, Any], unit: HeadUnit, allow_remote_code: bool
) -> tuple[int, ...]:
    """Numbers of query heads that every block can end with: all of these units, and a class that holds the result."""
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
) -> None:
    """Refuses a scheme of another model, or one whose targets the family cannot express.

    Args:
        adapter: The family.
        config: The model's config.
        space: Its space.
        fine: The scheme's section; None if neither heads nor dims are pruned.
        uneven: Kinds of units that the blocks share out among them.

    Raises:
        UserError: naming the model's sizes, or the targets that are possible.
    """
    if fine is None:
        return
    for kind, key, wanted in (("heads", "num_heads", fine.num_heads), ("dimff", "dim_ff", fine.dim_ff)):
        sizes = sorted({group.size * group.members for group in space.groups if group.kind == kind})
        if sizes and sizes != [wanted]:
            raise UserError(
                f"fine-grained.{key} is not the model's",
                wanted=", ".join(map(str, sizes)),
                got=wanted,
                remedy=f"set {key} to the size before pruning",
            )
    heads = next((group for group in space.groups if group.kind == "heads"), None)
    if uneven and adapter.abilities.is_stock and not fine.allow_remote_code:
        raise UserError(
            'scope "global": no stock class holds blocks that differ',
            remedy="set fine-grained.allow_remote_code to true (do_prune.py --uniform still fills the result up)",
        )
    if heads is not None and "heads" in uneven:
        _check_shared_budget(space)
    elif heads is not None and fine.target_num_heads != fine.num_heads:
        _check_heads(adapter, config, heads, fine)


def _has_one_section(space: PruningSpace) -> bool:
    return all(group.sections == 1 for group in space.of("heads"))


def _check_shared_budget(space: PruningSpace) -> None:
    if not _has_one_section(space):
        raise UserError(
            'scope "global" cannot choose single query heads: one budget would keep more of them in one key-value '
            "group of a block than in another, which no attention class computes",
            wanted="whole key-value groups as units",
            remedy='set fine-grained.head_unit to "kv_group" or "auto"',
        )


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
        "fine-grained.target_num_heads: the family cannot express it",
        wanted="; or ".join(texts),
        got=fine.target_num_heads,
        remedy=remedy,
    )


def nearest_heads(adapter: Adapter, config: Mapping[str, Any], wanted: float) -> tuple[HeadUnit, int]:
    """The unit and number of heads nearest to what is wanted; of equally near ones, those that a stock class holds.

    Args:
        adapter: The family.
        config: The model's config.
        wanted: A share (float) or a number (int) of query heads per block.

    Raises:
        UserError: no units add up to the number.
    """
    choices: list[tuple[bool, int, HeadUnit]] = []
    for unit in adapter.head_units(config):
        stock = reachable_heads(adapter, config, unit, False)
        choices += [(number not in stock, number, unit) for number in reachable_heads(adapter, config, unit, True)]
    numbers = sorted({number for _, number, _ in choices})
    goal = wanted if isinstance(wanted, int) else wanted * numbers[-1]
    _, nearest, unit = min(choices, key=lambda choice: (abs(choice[1] - goal), choice[0]))
    if isinstance(wanted, int) and nearest != wanted:
        raise UserError(f"keep: heads={wanted} cannot be reached", wanted=", ".join(map(str, numbers)))
    return unit, nearest
