"""The Python API: plan and apply masks of a transformers model in the caller's own process.

No launcher, no files and no DeepSpeed are needed. The command line calls the same gates, budgets and reshaping.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from cook.base.errors import UserError
from cook.base.seeds import derived_seed
from cook.config.kinds import NAMES, Kind
from cook.config.scheme import HeadUnitChoice
from cook.families.registry import by_config
from cook.pruning.budgets import (
    KINDS,
    MIB,
    WHOLE_KEYS,
    Cost,
    Keep,
    Targets,
    check_keep,
    constraints,
    unit_cost,
    whole_budget,
)
from cook.pruning.compensation import keep_of_wider
from cook.pruning.count_pricing import CountPricing
from cook.pruning.counts import active_parameters, forward_flops, parameters, unit_flops
from cook.pruning.family import Adapter, refuse_experts
from cook.pruning.gates import Gates
from cook.pruning.live import LiveGates
from cook.pruning.relaxation import Deterministic, HardConcrete, Relaxation
from cook.pruning.units import HeadUnit, PruningSpace, UnitGroup
from cook.recipe.head_units import (
    BUDGET_UNITS,
    budget_kinds,
    nearest_head_dim,
    nearest_heads,
    nearest_hidden,
    no_experts,
    offered_units,
)
from cook.report.tables import human_count, markdown_table

Batch = Mapping[str, torch.Tensor]
Means = Mapping[str, torch.Tensor]
"""Means of input features of output projections, float32 `[features]`, by the name of the group with gates there."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a model will keep, before anything is trained."""

    family: str
    """The model's family."""
    head_unit: HeadUnit
    """What is removed as one unit of attention: a key-value group with its query heads, or one query head."""
    units: dict[str, tuple[int, int]]
    """For blocks, heads and dims that are pruned: how many there are, and how many are kept (expected, if they share a
    budget with other kinds)."""
    parameters: tuple[int, int]
    """Of the whole model, before and after."""
    active_parameters: tuple[int, int]
    """The same of those that compute one token: of experts, only the ones that a token passes through."""
    flops: tuple[float, float]
    """Of one token's forward pass, before and after."""

    @property
    def _has_experts(self) -> bool:
        return self.active_parameters[0] < self.parameters[0]

    def __str__(self) -> str:
        rows = [
            ["parameters", *map(human_count, self.parameters)],
            *([["active parameters", *map(human_count, self.active_parameters)]] if self._has_experts else []),
            ["FLOPs per token", *map(human_count, self.flops)],
            *([name, str(total), str(kept)] for name, (total, kept) in self.units.items()),
        ]
        return markdown_table([self.family, "before", "after"], rows)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A live model, what may go from it, and how much."""

    adapter: Adapter
    config: dict[str, Any]
    head_unit: HeadUnit
    space: PruningSpace
    learned: tuple[UnitGroup, ...]
    targets: Targets


def plan(
    model: torch.nn.Module,
    keep: Keep,
    *,
    head_unit: HeadUnitChoice = "auto",
    context: int = 512,
    hidden: bool = False,
    round_to: int = 1,
    units: Collection[str] = (),
) -> Plan:
    """Predicts the sizes of a pruned model. Nothing is trained and the model is not changed.

    Args:
        model: A transformers model of a known family.
        keep: What to keep, one of
            `{"params": 0.7}`: the share of the whole model's parameters, taken out of heads and FFN dimensions by one
            budget for all blocks; in a model with experts, out of heads and whole experts;
            `{"flops": 0.7}`: the same for the FLOPs of a forward pass;
            `{"memory_mib": 200}`: MiB of all weights in the model's dtype, and of the cache of `context` tokens;
            or any of `"blocks"` (share of the parameters in attention and FFN blocks), `"heads"`, `"experts"` and
            `"dims"` (share, or number as an int, that each block keeps; dims of an expert, where there are experts),
            `"head_dims"` and `"hidden"` (the same of the dimensions of a head and of the hidden size).
        head_unit: What is removed as one unit of attention where query heads share keys and values: `"query_head"`,
            `"kv_group"` (a key-value head with all its query heads), or `"auto"`. With budgets for the whole model,
            `auto` means query heads, each key-value head going with the last of them; with `heads` it means whole
            groups where these reach the number.
        context: Mean number of keys to which a query attends, for FLOPs; the length of the cache, for memory.
        hidden: Whether hidden dimensions too are units of a budget for the whole model.
        round_to: A number, such as 64, of which the hidden size and the FFN dimensions of a block end as multiples.
        units: What a budget for the whole model may take: names of `"blocks"`, `"heads"`, `"experts"`, `"dims"`,
            `"head_dims"` and `"hidden"`, or `"all"` that the model has. Empty: heads, experts and dims. What is left
            out stays as it is.

    Raises:
        UserError: unknown family or key, or a size that cannot be reached.
    """
    job = _job(model, keep, context, head_unit, hidden, round_to, units)
    even: dict[str, float] = {}
    for c in constraints(job.space, job.learned, job.targets):
        share = 1.0 - c.target if not isinstance(c.pricing, CountPricing) else c.pricing.even(1.0 - c.target)
        even |= dict.fromkeys(c.groups, share)
    kept = {g.name: round(even[g.name] * g.size) for g in job.learned if g.kind != "layer"}
    shown: dict[str, tuple[int, int]] = {}
    for kind, names in NAMES.items():
        groups_of_kind = [g for g in job.learned if g.kind == kind]
        if groups_of_kind:
            total = sum(g.size * g.members for g in groups_of_kind)
            shown[names.plural] = total, round(sum(even.get(g.name, 1.0) * g.size * g.members for g in groups_of_kind))
    before, flops = parameters(job.space), forward_flops(job.space, context=context)
    after, flops_after = float(parameters(job.space, kept)), forward_flops(job.space, kept, context=context)
    active, active_after = active_parameters(job.space), float(active_parameters(job.space, kept))
    if job.targets.blocks is not None:
        gone = 1 - job.targets.blocks  # of what is left inside of the blocks
        outside = before - sum(_all(job.space, g, "parameters") for g in job.learned if g.kind == "layer")
        inner = [g for g in job.space.groups if g.kind != "layer"]
        flops_outside = flops - sum(unit_flops(job.space, g, context=context) * g.size for g in inner)
        after -= gone * (after - outside)
        active_after -= gone * (active_after - outside)
        flops_after -= gone * (flops_after - flops_outside)
    return Plan(
        family=job.adapter.family,
        head_unit=job.head_unit,
        units=shown,
        parameters=(before, round(after)),
        active_parameters=(active, round(active_after)),
        flops=(flops, flops_after),
    )


def attach(
    model: torch.nn.Module,
    keep: Keep,
    *,
    steps: int,
    head_unit: HeadUnitChoice = "auto",
    seed: int = 0,
    context: int = 512,
    hidden: bool = False,
    round_to: int = 1,
    units: Collection[str] = (),
    means: Means | None = None,
) -> LiveGates:
    """Attaches learned gates to a model, for a training loop of your own.

    Args:
        model: A transformers model of a known family, on its device.
        keep: As for `plan`.
        steps: Optimizer steps in which the masks are learned.
        head_unit: As for `plan`.
        seed: Of the gates' noise, where they have any.
        context: As for `plan`.
        hidden: As for `plan`.
        round_to: As for `plan`.
        units: As for `plan`.
        means: The means of features that take the place of removed units', from `cook.mean_inputs`; the budget then
            counts the biases that `cook.reshape` makes of them. None: removed units leave nothing.

    Raises:
        UserError: as for `plan`.
    """
    return attach_nested(
        model,
        [keep],
        steps=steps,
        head_unit=head_unit,
        seed=seed,
        context=context,
        hidden=hidden,
        round_to=round_to,
        units=units,
        means=means,
    )


def attach_nested(
    model: torch.nn.Module,
    keeps: Sequence[Keep],
    *,
    steps: int,
    head_unit: HeadUnitChoice = "auto",
    seed: int = 0,
    context: int = 512,
    hidden: bool = False,
    round_to: int = 1,
    units: Collection[str] = (),
    means: Means | None = None,
) -> LiveGates:
    """As `attach`, for nested masks of several sizes: every step trains one of them.

    Args:
        model: As for `attach`.
        keeps: What each size keeps, from the largest to the smallest, with the same key.
        steps: As for `attach`.
        head_unit: As for `attach`.
        seed: Of the gates' noise, and of the sizes' order.
        context: As for `plan`.
        hidden: As for `plan`.
        round_to: As for `plan`.
        units: As for `plan`.
        means: As for `attach`.

    Raises:
        UserError: as for `plan`; also if the sizes do not have the same units.
    """
    if steps < 1:
        raise UserError("steps", wanted="1 or more", got=str(steps))
    jobs = [_job(model, keep, context, head_unit, hidden, round_to, units, means) for keep in keeps]
    job = jobs[0]
    if any(other.learned != job.learned for other in jobs):
        raise UserError(
            "keep: the sizes have different units of attention",
            got=", ".join(other.head_unit for other in jobs),
            remedy='set head_unit to "query_head" or "kv_group"',
        )
    relaxation: Relaxation = Deterministic()
    if all(group.kind == "layer" for group in job.learned):
        relaxation = HardConcrete()
    budgets, *smaller = [constraints(other.space, other.learned, other.targets) for other in jobs]
    gates = Gates(
        {group.name: group.size for group in job.learned},
        budgets,
        smaller=[
            [replace(c, name=f"{c.name}, size {number}") for c in each] for number, each in enumerate(smaller, start=1)
        ],
        steps=steps,
        seed=derived_seed(seed, "gates"),
        relaxation=relaxation,
    )
    return LiveGates(model, job.space, job.learned, gates, means=means)


def family_of(model: torch.nn.Module) -> tuple[Adapter, dict[str, Any]]:
    """The adapter of a live model, and its config in the adapter's own terms."""
    config = config_of(model)
    adapter = by_config(config)
    native, _ = adapter.read(config, {})
    refuse_experts(adapter.experts(native))
    return adapter, native


def config_of(model: torch.nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise UserError(f"{type(model).__name__}: not a transformers model", wanted="a model with a config")
    return dict(config.to_dict())


def _job(
    model: torch.nn.Module,
    keep: Keep,
    context: int,
    choice: HeadUnitChoice,
    hidden: bool,
    round_to: int,
    units: Collection[str],
    means: Means | None = None,
) -> _Job:
    check_keep(keep)
    if round_to < 1:
        raise UserError("round_to", wanted="1 or more", got=str(round_to))
    total = [key for key in WHOLE_KEYS if key in keep]
    adapter, config = family_of(model)
    if means:
        narrow, config = config, adapter.with_biases(config)
        keep = keep_of_wider(keep, adapter.space(narrow), adapter.space(config))
    head_unit = offered_units(adapter, config, choice)[-1 if total else 0]
    space = adapter.space(config, head_unit)
    kept: dict[Kind, int | float] = {}
    if total:
        kinds = budget_kinds(space, units, (), hidden)
    else:
        kinds = tuple(kind for name, kind in BUDGET_UNITS.items() if name in keep)
        if "heads" in keep:
            head_unit, kept["heads"] = nearest_heads(adapter, config, keep["heads"], choice)
        kept |= {BUDGET_UNITS[name]: keep[name] for name in ("experts", "dims") if name in keep}
        space = adapter.space(config, head_unit)
    if "head_dims" in kinds:
        kept["head_dims"] = nearest_head_dim(adapter, space, keep.get("head_dims", 1.0))
    if "hidden" in kinds:
        kept["hidden"] = nearest_hidden(adapter, config, space, keep.get("hidden", 1.0), round_to)
    learned = tuple(group for kind in KINDS if kind in kinds for group in space.of(kind))
    for name in keep if not total else ():
        if name != "experts" and not any(group.kind == BUDGET_UNITS[name] for group in learned):
            raise UserError(f"keep: {name}: this {adapter.family} model has none that can go", remedy="leave it out")
    if "experts" in kinds and not space.of("experts"):
        raise no_experts(adapter)
    if total:
        learned = tuple(group for group in learned if not group.is_even)
    targets = Targets(blocks=keep.get("blocks"), kept=kept)
    if total == ["latency_ms"]:
        raise UserError("keep: latency_ms needs the model's files", remedy="use `cook prune`, which measures the model")
    if total == ["memory_mib"]:
        size = next(model.parameters()).element_size()
        limit = keep["memory_mib"] * MIB
        targets = Targets(scope="global", cost="bytes", limit=limit, context=context, number_bytes=size)
    elif total:
        cost: Cost = "parameters" if total == ["params"] else "flops"
        targets = whole_budget(space, learned, cost, keep[total[0]], context)
    targets = replace(targets, round_to=round_to)
    return _Job(adapter=adapter, config=config, head_unit=head_unit, space=space, learned=learned, targets=targets)


def _all(space: PruningSpace, group: UnitGroup, cost: Literal["parameters", "flops"]) -> float:
    return unit_cost(space, group, Targets(cost=cost)) * group.size
