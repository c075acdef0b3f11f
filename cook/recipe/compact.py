"""The model that a stage with fixed masks trains: the one without the removed units.

It computes what the masked model computes, in less time and memory. Files keep the layout of the whole model: masks
count the original units, and the weights of removed units are written back unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from cook.base.distributed import say
from cook.config.distillation import OWN_TEACHER
from cook.distill.taps import lacking
from cook.pruning.mask_set import Masks
from cook.pruning.reshape import kept_units, reshaped, restored
from cook.pruning.units import PruningSpace, UnitGroup
from cook.recipe.distillation import DistillationPlan
from cook.recipe.inputs import Inputs
from cook.recipe.plan import Stage


def without_masked_units(stage: Stage, inputs: Inputs, distillation: DistillationPlan | None) -> Inputs:
    """The inputs of training with the units removed that fixed masks remove.

    Groups, modules and weights keep their names. Weights keep their values, but for factors of queries and norms.

    Returns:
        `inputs` itself if nothing is removed, or if the stage needs the whole model; the reason is printed.
    """
    compact, reason = compact_inputs(stage, inputs, distillation)
    if reason:
        say(f"{stage.name}: trains the whole model with masks applied, since {reason}")
    return compact


def compact_inputs(stage: Stage, inputs: Inputs, distillation: DistillationPlan | None) -> tuple[Inputs, str | None]:
    """The same, and why the stage needs the whole model if it does."""
    cut = [group for group in inputs.space.every if _loses_units(inputs, group)]
    if not cut or not stage.config.training.remove_masked:
        return inputs, None
    reason = _needs_whole_model(stage, inputs, distillation, cut)
    return (inputs if reason else cut_inputs(inputs)), reason


def cut_inputs(inputs: Inputs) -> Inputs:
    """The same inputs, without the units that the fixed masks remove."""
    assert inputs.weights is not None
    kept = kept_units(inputs.space, inputs.fixed)
    shrunk = inputs.adapter.shrink(inputs.model_config, inputs.space, kept, renumber=False)
    space = inputs.adapter.space(shrunk.config, inputs.head_unit)
    learned = {group.name for group in inputs.learned}
    weights = reshaped(inputs.weights, inputs.space, inputs.fixed)
    return replace(
        inputs,
        model_config=shrunk.config,
        weights=weights,
        space=space,
        fixed={},
        nested=tuple(_among(kept, space, masks) for masks in inputs.nested),
        learned=tuple(group for group in space.every if group.name in learned),
    )


def _among(kept: Mapping[str, tuple[int, ...]], space: PruningSpace, masks: Masks) -> dict[str, torch.Tensor]:
    """Masks of the groups of the smaller `space`, without the units that are not kept."""
    names = [group.name for group in space.every if group.name in masks]
    return {name: masks[name][list(kept[name])] if name in kept else masks[name] for name in names}


def whole_weights(
    weights: Iterable[tuple[str, torch.Tensor]], whole: Inputs, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the smaller model in the shapes of the whole model; removed blocks in `dtype`, None: as stored."""
    assert whole.weights is not None
    return restored(weights, whole.weights, whole.space, whole.fixed, dtype)


def _loses_units(inputs: Inputs, group: UnitGroup) -> bool:
    return group.name in inputs.fixed and not bool(inputs.fixed[group.name].all())


def _needs_whole_model(
    stage: Stage, inputs: Inputs, distillation: DistillationPlan | None, cut: list[UnitGroup]
) -> str | None:
    gated = {group.name for group in inputs.learned}.union(*inputs.nested)
    if any(g.kind == "experts" for g in cut) and any(g.is_even and g.name in gated for g in inputs.space.of("dimff")):
        return "the dims of removed experts have gates"
    if distillation is None:
        return None
    if distillation.options.teacher == OWN_TEACHER and not stage.adapted and not stage.sizes:
        return "it is the teacher, with all masks open"
    heads = [group for group in cut if group.kind == "heads"]
    if distillation.attention and heads:
        return "the teacher's attention is compared head by head"
    if distillation.hidden and any(group.kind == "hidden" for group in cut):
        return "its hidden states are compared with the teacher dim by dim"
    for pair in distillation.hidden:
        place = pair.student
        for group in cut:
            for gate in (group.gate, *(group.more_gates if group.kind == "head_dims" else ())):
                inside = place.path.startswith(f"{gate.module.rpartition('.')[0]}.")
                # What a block's last product returns has the hidden size, whatever units are gone.
                is_product = gate.at == "output" and group.kind == "head_dims"
                if inside and (is_product or (place.path, place.when) != (gate.module, "post")):
                    return f"{place.path} is compared with the teacher unit by unit"
    configs = inputs.model_config, cut_inputs(inputs).model_config
    with torch.device("meta"):
        whole, small = map(inputs.adapter.build, configs)
    for pair in (*distillation.hidden, *distillation.attention):
        path = pair.student.path
        if lacking(small, path) or type(small.get_submodule(path)) is not type(whole.get_submodule(path)):
            return f"{path}, which is compared with the teacher, is removed"
    return None
