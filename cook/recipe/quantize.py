"""The stage `quantize`: the modules that it rounds, of the model without the removed units."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cook.base.errors import UserError
from cook.quantization.prepare import check_requirements
from cook.quantization.schemes import Matrix, Scheme, chosen_modules, scheme_of
from cook.recipe.compact import compact_inputs, cut_inputs
from cook.recipe.distillation import DistillationPlan
from cook.recipe.inputs import Inputs, open_inputs
from cook.recipe.plan import Stage


def stage_scheme(stage: Stage) -> Scheme | None:
    """How the stage rounds weights; None for other stages."""
    options = stage.quantization
    return scheme_of(options.scheme, options.group_size) if options else None


def quantized_modules(stage: Stage, inputs: Inputs, distillation: DistillationPlan | None) -> dict[str, Matrix]:
    """The modules that the stage rounds, by path; none in other stages.

    Args:
        stage: The plan.
        inputs: The whole model and its masks.
        distillation: The teacher, if the stage has one.

    Raises:
        UserError: the stage needs the whole model, a package or a GPU is missing, or the modules do not fit.
    """
    scheme = stage_scheme(stage)
    if scheme is None:
        return {}
    check_requirements(scheme)
    compact, reason = compact_inputs(stage, inputs, distillation)
    if reason is not None:
        raise UserError(
            f"{stage.name}: would train the whole model with masks applied, since {reason}",
            wanted="the model without the removed units: the scale of a row must not depend on them",
            remedy="leave this pair out of the distillation, or this stage out of distillation.stages",
        )
    return _chosen(stage, compact, scheme)


def check_quantization(stage: Stage, inputs: Inputs) -> None:
    """Finds mistakes in the section `quantization` before the earlier stages have run.

    Args:
        stage: The plan.
        inputs: The model, and the masks that exist already.

    Raises:
        UserError: a name fits no module, or the group size does not divide an input size that is known already.
    """
    if scheme := stage_scheme(stage):
        if not inputs.fixed and not stage.mask_files():
            _chosen(stage, inputs, scheme)
        elif inputs.weights is not None and all(Path(path).exists() for path in stage.mask_files()):
            _chosen(stage, cut_inputs(inputs), scheme)
        else:
            _chosen(stage, inputs, replace(scheme, group_size=None))


def check_early(stage: Stage) -> None:
    """Checks what the stage needs before the first stage of the recipe starts.

    Raises:
        UserError: a package or a GPU is missing, or as `check_quantization`.
    """
    if scheme := stage_scheme(stage):
        check_requirements(scheme)
        check_quantization(stage, open_inputs(stage, must_exist=False))


def _chosen(stage: Stage, inputs: Inputs, scheme: Scheme) -> dict[str, Matrix]:
    assert stage.quantization is not None
    with torch.device("meta"):
        model = inputs.adapter.build(inputs.model_config)
    options = stage.quantization
    aliases = inputs.adapter.aliases
    return chosen_modules(model, scheme, options.quantized_module, aliases, embeddings=options.embeddings)


def quantization_record(stage: Stage, modules: dict[str, Matrix], precision: str) -> dict[str, Any]:
    """What an export must know of the stage's rounding, for its `done.json`; empty for other stages."""
    if stage.quantization is None:
        return {}
    options = stage.quantization
    linear, tables = ([path for path, m in modules.items() if m.is_embedding == kind] for kind in (False, True))
    named = {"scheme": options.scheme, "group_size": options.group_size, "modules": linear, "embeddings": tables}
    return {"quantization": named | {"precision": precision}}
