"""The inputs of a stage: its model, masks and constraints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cook.base.errors import UserError
from cook.base.seeds import derived_seed, generator
from cook.config.kinds import FINE_STAGES, NAMES, OPTIONAL, Kind
from cook.config.types import FineConfig
from cook.families.registry import by_config
from cook.families.source import open_model, with_biases
from cook.pruning.block_times import read_block_times
from cook.pruning.budgets import MIB, Targets, constraints
from cook.pruning.compensation import compensable
from cook.pruning.family import Adapter, ModelSource, refuse_experts
from cook.pruning.gates import Gates
from cook.pruning.mask_file import read_masks
from cook.pruning.mask_set import consistent, kept_counts, kept_groups, without_empty_blocks
from cook.pruning.random_masks import random_masks_like
from cook.pruning.relaxation import Deterministic, HardConcrete, Relaxation
from cook.pruning.restrict import restrict
from cook.pruning.units import WIDE, HeadUnit, PruningSpace, UnitGroup
from cook.recipe.head_units import check_sizes, choose_head_unit, heads_stay, no_experts, size_stays
from cook.recipe.plan import LEARNS, MaskPaths, Stage, mask_paths
from cook.sparsity.matrices import matrices_of, restricted


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The model on disk and the masks of a stage."""

    adapter: Adapter
    model_config: dict[str, Any]
    weights: Mapping[str, torch.Tensor] | None
    """None: freshly initialised."""
    origin: str
    """Description of where the weights come from, for the plan and the model card."""
    folder: Path | None
    """The Hugging Face folder with the weights, if there is one."""
    head_unit: HeadUnit
    """The kind of attention unit."""
    space: PruningSpace
    """The whole space, regardless of `pruned_module`; files and counts refer to it."""
    fixed: dict[str, torch.Tensor]
    """Masks that are fixed during the stage."""
    nested: tuple[dict[str, torch.Tensor], ...] = ()
    """The masks of each size in a stage that trains several sizes with fixed masks, from the largest, which is `fixed`.
    """
    learned: tuple[UnitGroup, ...]
    """Groups whose masks are learned, among those that `pruned_module` allows."""


def open_inputs(stage: Stage, *, must_exist: bool = True) -> Inputs:
    """Finds the weights and masks of a stage.

    Args:
        stage: The plan.
        must_exist: False for a dry run, where files that earlier stages will write may be missing.

    Raises:
        UserError: names what is missing or does not fit.
    """
    adapter, config, weights, origin = _model(stage, must_exist)
    if not adapter.is_causal:
        raise UserError(
            f"{origin}: {adapter.family} is not a causal language model, which this command needs",
            remedy="prune it on a benchmark task with cook tasks",
        )
    if adapter.mixes_samples(config):
        raise UserError(
            f"{origin}: the class of this {adapter.family} model cannot separate the samples that share a row",
            remedy="prune it with your own batches: cook.learn_masks, cook.reshape",
        )
    if stage.is_moefy or stage.learns or stage.is_random_baseline or stage.pattern_mask:
        refuse_experts(adapter.experts(config))
    head_unit: HeadUnit = "kv_group"  # patterns need units in all attention matrices
    if stage.pattern_mask is None:
        joint = stage.config.joint
        # `cook profile` measures whole groups.
        one_budget = stage.one_budget and joint is not None and joint.target_latency is None
        head_unit = choose_head_unit(
            adapter, config, stage.config.fine, uneven="heads" in stage.uneven, one_budget=one_budget
        )
    space = adapter.space(config, head_unit)
    allowed = space
    if stage.pattern_mask is not None:
        restricted(matrices_of(space), stage.config.pruning.pruned_module, adapter.aliases)  # reports mistakes early
    elif stage.config.pruning.pruned_module and stage.name != "pretrain":
        allowed = restrict(space, stage.config.pruning.pruned_module, adapter.aliases)
    fine = stage.config.fine if _prunes(stage, *FINE_STAGES, "joint") else None
    keeps_heads = not (_prunes(stage, "att", "joint") or stage.fixed.heads)
    check_sizes(adapter, config, allowed, fine, stage.uneven, keeps_heads=keeps_heads)
    found = [paths if must_exist else _existing(paths) for paths in stage.by_size(stage.fixed)]
    fixed, *smaller = [read_masks(allowed, **p.by_option) for p in found]
    nested = (fixed, *smaller) if stage.sizes and fixed else ()
    if stage.is_random_baseline and must_exist:
        fixed = _random_baseline(stage, allowed)
    learned: tuple[UnitGroup, ...] = ()
    for kind in stage.learns:
        whole = kind == "layer" or kind in WIDE
        groups = allowed.of(kind) if whole else tuple(kept_groups(allowed, fixed, kind))
        if stage.name == "joint_mask" and stage.one_budget and any(group.is_even for group in groups):
            if kind == "experts":
                raise UserError(
                    f"{stage.name}: the experts of this model are in groups, which must keep the same number",
                    remedy='set joint.scope to "block", or leave fine-grained.target_experts out',
                )
            continue  # the dims of experts stay: whole experts are the units of this budget
        if not groups and kind in WIDE and not space.of(kind):
            raise size_stays(adapter, kind)
        if not groups and kind == "experts" and not space.of("experts"):
            raise no_experts(adapter)
        if not groups and kind == "heads" and space.of("layer", "att") and not space.of("heads"):
            raise heads_stay(adapter)
        if not groups:
            names = "the names of their weights"
            if kind == "head_dims":
                names = "the names of all matrices of attention"
            if kind == "hidden":
                names = "the names of all matrices on the residual stream, embeddings and output projection included"
            raise UserError(
                f"{stage.name}: pruned_module leaves no units of kind {kind!r} to learn a mask for",
                remedy=f"add {names} to pruning.pruned_module, or remove the stage",
            )
        learned += groups
        if kind == "heads" and stage.one_budget:
            learned += tuple(kept_groups(allowed, fixed, "keys"))
    if stage.compensates and not compensable(space, learned):
        raise UserError(
            f"{stage.name}: gates.compensation needs output projections with a bias",
            got=f"{adapter.family}, whose class has none here, and no setting for one",
            remedy="set gates.compensation to false",
        )
    # A file of the other kind of fine mask may also hold this kind, from an earlier training.
    fixed = {name: mask for name, mask in fixed.items() if name not in {group.name for group in learned}}
    return Inputs(
        adapter=adapter,
        model_config=config,
        weights=weights,
        origin=origin,
        folder=Path(origin) if weights is not None and Path(origin).is_dir() else None,
        head_unit=head_unit,
        space=space,
        fixed=fixed,
        nested=nested,
        learned=learned,
    )


Found = tuple[Adapter, dict[str, Any], Mapping[str, torch.Tensor] | None, str]
"""A model's adapter, config and weights, and where they come from."""


def _model(stage: Stage, must_exist: bool) -> Found:
    model = stage.config.model
    before = Path(stage.config.output_dir) / stage.after if stage.after else None
    if before and (before / "done.json").exists():
        return _opened(stage, open_model(before / "model"), str(before / "model"))
    if before and must_exist:
        raise UserError(
            f"{stage.name} starts from the weights of {stage.after}, which has not finished",
            wanted=f"{before / 'done.json'}",
            remedy=f'run --stage {stage.after} first (or --stage all), or remove it from "stages" and set model.path',
        )
    if model.path and (must_exist or Path(model.path).exists()):
        return _opened(stage, open_model(model.path, config=model.config), model.path)
    assert model.config is not None, "the config loader requires model.config or model.path"
    adapter = by_config(model.config)
    native, _ = adapter.read(model.config, {})
    if stage.name != "pretrain" and must_exist:
        raise UserError(
            f"{stage.name} has no weights to start from",
            remedy="set model.path to a pretrained model, or put a pretrain stage before it",
        )
    origin = f"the end of {stage.after}" if stage.after else "fresh weights"
    return adapter, native, None, origin


def _opened(stage: Stage, source: ModelSource, origin: str) -> Found:
    source = with_biases(source) if stage.compensates else source
    return source.adapter, source.config, source.tensors, origin


def _existing(paths: MaskPaths) -> MaskPaths:
    def there(path: str | None) -> str | None:
        return path if path and Path(path).exists() else None

    return MaskPaths(**{kind: there(path) for kind, path in vars(paths).items()})


def _prunes(stage: Stage, *units: str) -> bool:
    """Whether this or another stage of the recipe prunes such units; mistakes of later stages are reported early."""
    names = {stage.name, *(entry.name for entry in stage.config.stages)}
    sizes_differ = stage.name == "pretrain" or stage.after == "moefy"  # a model without the masked units
    return not sizes_differ and any(name.startswith(units) for name in names)


def _random_baseline(stage: Stage, space: PruningSpace) -> dict[str, torch.Tensor]:
    for entry in stage.config.stages:
        if entry.name in LEARNS and not (Path(stage.config.output_dir) / entry.name / "done.json").exists():
            raise UserError(
                f"random_baseline needs the masks of all stages, and {entry.name} has not finished",
                remedy=f"run --stage {entry.name} first (or --stage all)",
            )
    paths = _existing(mask_paths(stage.config))
    if paths == MaskPaths():
        raise UserError(
            "random_baseline needs learned masks, and there are none yet",
            remedy="run the mask stages first, or name their mask files in the scheme",
        )
    learned = read_masks(space, **paths.by_option)
    return random_masks_like(space, learned, generator(stage.config.seed, "random baseline"))


def make_gates(stage: Stage, inputs: Inputs) -> Gates | None:
    """The gates that the stage learns, with their constraints; None if it learns no mask."""
    if not inputs.learned:
        return None
    options = stage.config.gates
    # Measured: with a few dozen gates that each change the loss a lot, noise helps to explore combinations.
    by_kind = "hard_concrete" if stage.learns == ("layer",) else "deterministic"
    relaxation: Relaxation = Deterministic(concavity=options.concavity)
    start = options.start
    if start == "search":
        if stage.learns != ("layer",):
            raise UserError(
                f'{stage.name}: gates.start "search" is for stages that learn blocks alone',
                remedy='set gates.start to "open" for the other stages (--set gates.start=open)',
            )
    elif (by_kind if options.relaxation == "auto" else options.relaxation) == "hard_concrete":
        relaxation = HardConcrete(initial_log_alpha=options.initial_log_alpha)
    before, names = kept_counts(inputs.fixed), [f", {size:g}" for size in stage.sizes] or [""]
    of_sizes = [
        constraints(inputs.space, inputs.learned, replace(stage_targets(stage, number), before=before))
        for number in range(len(names))
    ]
    budgets, *smaller = [
        [replace(c, name=c.name + name) for c in each] for name, each in zip(names, of_sizes, strict=True)
    ]
    return Gates(
        {group.name: group.size for group in inputs.learned},
        budgets,
        smaller=smaller,
        steps=stage.config.training.steps,
        seed=derived_seed(stage.config.seed, stage.name),
        relaxation=relaxation,
        learning_rate=options.learning_rate,
        ramp_fraction=options.ramp,
        start=start,
        start_steps=options.start_steps,
    )


def stage_targets(stage: Stage, number: int = 0) -> Targets:
    """The targets of the gates in a mask stage; with several sizes, of that number, the largest first."""
    fine, joint = stage.config.fine, stage.config.joint if stage.name == "joint_mask" else None
    coarse = joint or stage.config.coarse
    sparsity = coarse.target_sparsity if coarse else None
    length = stage.config.data.max_length
    targets = Targets(
        blocks=None if sparsity is None else 1.0 - sparsity,
        kept=_kept(fine) if fine else {},
        round_to=fine.round_to if fine else 1,
        scope=joint.scope if joint else fine.scope if fine else "block",
        cost="parameters" if joint else "units",
        context=length,
    )
    if joint is None:
        return targets
    if joint.target_flops is not None:
        return replace(targets, cost="flops", share=joint.share(number), context=joint.flops_length or length)
    if joint.target_latency is not None:
        assert joint.block_times is not None
        return replace(targets, cost="ms", limit=joint.target_latency, times=read_block_times(joint.block_times))
    if joint.target_memory is not None:
        tokens = length if joint.cache_length is None else joint.cache_length
        limit = joint.target_memory * MIB
        return replace(targets, cost="bytes", limit=limit, context=tokens, number_bytes=joint.number_bytes)
    return replace(targets, share=joint.share(number))


def _kept(fine: FineConfig) -> dict[Kind, int | float]:
    kept: dict[Kind, int | float] = {"heads": fine.target_num_heads, "dimff": fine.target_dimff}
    more: dict[Kind, int | None] = {kind: getattr(fine, NAMES[kind].target) for kind in OPTIONAL}
    return kept | {kind: target for kind, target in more.items() if target is not None}


def final_masks(stage: Stage, inputs: Inputs, gates: Gates | None, number: int = 0) -> dict[str, torch.Tensor]:
    """The masks at the end of a stage, of the size of that number: the fixed masks and the learned ones as 0/1."""
    fixed = inputs.nested[number] if inputs.nested else inputs.fixed
    masks = consistent(inputs.space, fixed | (gates.binary(number) if gates else {}))
    if stage.name == "joint_mask" and stage.one_budget:  # which leaves the dims of experts alone
        masks = {g.name: torch.ones(g.size) for g in inputs.space.of("dimff") if g.is_even} | masks
    return without_empty_blocks(inputs.space, masks) if stage.writes.layer else masks
