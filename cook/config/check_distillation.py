"""Checks of the `distillation` section: that a loss uses the teacher, and that the teacher does not change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from cook.base.errors import UserError
from cook.config.distillation import OWN_TEACHER, DistillationConfig
from cook.config.types import (
    CoarseConfig,
    FineConfig,
    JointConfig,
    PruningConfig,
    StageEntry,
    TrainingConfig,
    stage_of,
)


def distillation_does_something(distillation: DistillationConfig | None) -> Iterator[UserError]:
    """Checks that at least one loss has a weight, and that each loss on states names its modules."""
    if distillation is None:
        return
    hidden, attention = distillation.mse_hidn_scale, distillation.mse_att_scale
    if not (distillation.ce_scale or hidden or attention):
        remedy = 'set "distillation" to null to train without a teacher'
        what = "distillation: ce_scale, mse_hidn_scale and mse_att_scale are all 0"
        yield UserError(what, wanted="at least one above 0", remedy=remedy)
    pairs = (("hidn", hidden, distillation.mse_hidn_module), ("att", attention, distillation.mse_att_module))
    for kind, scale, modules in pairs:
        if bool(scale) != bool(modules):
            yield UserError(
                f"distillation: mse_{kind}_scale and mse_{kind}_module must be given together",
                wanted="a scale above 0 with at least one module, or neither",
                got=f"scale {scale:g} with {len(modules)} module(s)",
            )
    if distillation.mse_hidn_proj and not hidden:
        what = "distillation.mse_hidn_proj: no hidden states are compared"
        yield UserError(what, wanted="mse_hidn_scale above 0")


def teacher_can_teach(
    distillation: DistillationConfig | None,
    training: TrainingConfig,
    stages: tuple[StageEntry, ...],
    pruning: PruningConfig,
    coarse: CoarseConfig | None,
    fine: FineConfig | None,
    joint: JointConfig | None,
) -> Iterator[UserError]:
    """Checks that the recipe has the distillation's stages, and that weights stay fixed if the teacher is `self`."""
    if distillation is None:
        return
    trainings = {entry.name: dataclasses.replace(training, **entry.training) for entry in stages}
    for name in distillation.stages if stages else ():
        if name not in trainings:
            yield UserError(f"distillation.stages: {name} is not a stage of the recipe", wanted=", ".join(trainings))
    if distillation.teacher != OWN_TEACHER:
        return
    if distillation.teacher_device != "auto":
        got = distillation.teacher_device
        yield UserError('distillation.teacher_device: "self" has no weights of its own', wanted="auto", got=got)
    if not stages and (described := stage_of(pruning, coarse, fine, joint)):
        trainings = {described: training}
    unfit = [
        f"{name} ({why})"
        for name, own in trainings.items()
        if name != "pretrain" and name in (distillation.stages or trainings) and (why := unfit_for_itself(name, own))
    ]
    if unfit:
        yield own_teacher_moves(", ".join(unfit))


def unfit_for_itself(stage_name: str, training: TrainingConfig) -> str | None:
    """Returns why a model cannot be its own teacher in a stage, or None if it can."""
    if not stage_name.endswith("_mask"):
        return "it learns no mask"
    return "it trains weights" if training.train_weights else None


def own_teacher_moves(where: str) -> UserError:
    """Returns the error for a model that would be its own teacher while its weights are trained."""
    return UserError(
        'distillation.teacher: "self" is the dense model only while its weights stay fixed; in these stages the '
        "weights are trained, and the teacher would change with the student",
        wanted="mask stages with train_weights false",
        got=where,
        remedy='list only mask stages in distillation.stages and set "train_weights": false in their training, or set '
        "distillation.teacher to the folder of a dense model",
    )
