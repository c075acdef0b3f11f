"""The pruning scheme of `cook prune`: the content of `l0_pruning.json`."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from pathlib import Path
from typing import Any

from cook.base.errors import UserError
from cook.config.kinds import FINE, Kind
from cook.config.tasks import OneLineJob
from cook.pruning.budgets import WHOLE_KEYS, Cost, Keep, Targets, whole_budget
from cook.pruning.family import ModelSource
from cook.pruning.units import PruningSpace
from cook.recipe.head_units import (
    BUDGET_UNITS,
    budget_kinds,
    nearest_head_dim,
    nearest_heads,
    nearest_hidden,
    no_experts,
    offered_units,
    reachable_heads,
)

TIMES = "block_times.json"
"""The measured table, in the output folder."""
JOINT = ("joint_mask", "joint_finetune")


def scheme_of(job: OneLineJob, sizes: Sequence[Keep], source: ModelSource) -> tuple[dict[str, Any], tuple[str, str]]:
    """The scheme, and the names of the mask stage and of the finetuning after it.

    Raises:
        UserError: an option does not fit the others, or a size that cannot be reached.
    """
    keep, space = sizes[0], source.adapter.space(source.config)
    is_global = bool(set(keep) & set(WHOLE_KEYS))
    kinds = budget_kinds(space, job.units, job.pin, job.hidden) if is_global else ()
    for option, value in {"hidden": job.hidden and "hidden" not in keep, "units": job.units, "pin": job.pin}.items():
        if value and not is_global:
            remedy = "give --keep hidden=SHARE instead" if option == "hidden" else "leave it out"
            raise UserError(f"--{option}: for one budget of the whole model", remedy=remedy)
    coarse = {
        "train_mask": True,
        "coarse_mask": str(_masks(job) / "layer_mask.pt"),
        "target_sparsity": round(1.0 - keep.get("blocks", 0.8), 6),
    }
    if "blocks" in keep and len(keep) == 1:
        if job.search == "none":
            return {"coarse-grained": coarse}, ("layer_mask", "layer_finetune")
        gates = {"start": "search", "start_steps": 2}
        return {"coarse-grained": coarse | {"unit": job.search}, "gates": gates}, ("layer_mask", "layer_finetune")
    fine = _fine(job, keep, source, kinds, is_global)
    scheme: dict[str, Any] = {"coarse-grained": coarse, "fine-grained": fine}
    if is_global:
        return scheme | {"joint": _joint(job, sizes, space, kinds)}, JOINT
    if len(keep) > 1:
        joint = {"train_mask": True, "scope": "block"}
        if "blocks" in keep:
            joint["target_sparsity"] = coarse["target_sparsity"]
        return scheme | {"joint": joint}, JOINT
    unit_name = fine["prune_mode"]
    return scheme, (f"{unit_name}_mask", f"{unit_name}_finetune")


def _masks(job: OneLineJob) -> Path:
    return Path(job.output) / "run" / "masks"


def _fine(job: OneLineJob, keep: Keep, source: ModelSource, kinds: Sequence[Kind], is_global: bool) -> dict[str, Any]:
    """The section `fine-grained`: the targets of heads, experts and dims, or what a budget needs to know of them."""
    adapter, config, masks = source.adapter, source.config, _masks(job)
    space = adapter.space(config)
    heads = max((g.size * g.members for g in space.groups if g.kind == "heads"), default=1)
    inner = max((g for g in space.groups if g.kind == "dimff"), key=lambda g: g.counted, default=None)
    dims, step = (inner.counted, lcm(job.round_to, inner.multiple)) if inner else (1, 1)
    unit, kept_heads = offered_units(adapter, config, job.head_unit)[0], heads
    if "heads" in keep:
        unit, kept_heads = nearest_heads(adapter, config, keep["heads"], job.head_unit)
    kept_hidden = kept_head_dim = None
    if "hidden" in keep or "hidden" in kinds:
        kept_hidden = nearest_hidden(adapter, config, space, keep.get("hidden", 1.0), job.round_to)
    if "head_dims" in keep or "head_dims" in kinds:
        kept_head_dim = nearest_head_dim(adapter, space, keep.get("head_dims", 1.0))
    fine: dict[str, Any] = {
        "train_mask": True,
        "coarse_mask": str(masks / "layer_mask.pt") if is_global or len(keep) > 1 else None,
        "num_heads": heads,
        "dim_ff": dims,
        "target_num_heads": kept_heads,
        "target_dimff": _number(keep["dims"], dims, step) if "dims" in keep else dims,
        "head_unit": unit if kept_heads != heads else job.head_unit,
        "allow_remote_code": is_global
        or (kept_hidden, kept_head_dim) != (None, None)
        or kept_heads not in reachable_heads(adapter, config, unit, False),
        "heads_mask": str(masks / "heads_mask.pt"),
        "dimff_mask": str(masks / "dimff_mask.pt"),
        "prune_mode": next((names.stage for names in FINE.values() if names.option in keep), "ffn"),
    }
    if kept_head_dim is not None:
        fine |= {"target_head_dim": kept_head_dim, "head_dims_mask": str(masks / "head_dims_mask.pt")}
    if kept_hidden is not None:
        fine |= {"target_hidden": kept_hidden, "hidden_mask": str(masks / "hidden_mask.pt")}
    if "experts" in keep or "experts" in kinds:
        experts = space.of("experts")
        if not experts:
            raise no_experts(adapter)
        share = Targets(kept={"experts": keep.get("experts", 1.0)}).kept_share(experts[0])
        fine |= {"target_experts": round(share * experts[0].size), "experts_mask": str(masks / "experts_mask.pt")}
    if job.round_to > 1:
        fine["round_to"] = job.round_to
    return fine


def _joint(job: OneLineJob, sizes: Sequence[Keep], space: PruningSpace, kinds: Sequence[Kind]) -> dict[str, Any]:
    """The section `joint` of a budget for the whole model."""
    keep, joint = sizes[0], {"train_mask": True, "scope": "global"} | ({"blocks": True} if "layer" in kinds else {})
    if pin := [name for name in ("heads", "dims") if BUDGET_UNITS[name] not in kinds]:
        joint["pin"] = pin
    if "memory_mib" in keep:
        return joint | {"target_memory": keep["memory_mib"]}
    if "latency_ms" in keep:
        return joint | {"target_latency": keep["latency_ms"], "block_times": str(Path(job.output) / TIMES)}
    key = "params" if "params" in keep else "flops"
    cost: Cost = "parameters" if key == "params" else "flops"
    groups = [group for kind in kinds for group in space.of(kind)]
    shares = [whole_budget(space, groups, cost, size[key], job.max_length).share for size in sizes]
    return joint | {f"target_{key}": shares[0] if len(shares) == 1 else [round(share or 0.0, 6) for share in shares]}


def _number(wanted: float, size: int, round_to: int) -> int:
    """A number as it is; a share of `size` as the nearest multiple of `round_to`, at least one."""
    return (
        wanted if isinstance(wanted, int) else round_to * max(1, min(size // round_to, round(wanted * size / round_to)))
    )
