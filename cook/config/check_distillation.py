"""Checks of the `distillation` section: that it does something, and that its teacher stands still."""

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
    """A teacher is only run if one of the losses has a weight, and states are compared only of named modules."""
    if distillation is None:
        return
    hidden, attention = distillation.mse_hidn_scale, distillation.mse_att_scale
    if not (distillation.ce_scale or hidden or attention):
        remedy = 'set "distillation" to null to do without a teacher'
        what = "distillation: ce_scale, mse_hidn_scale and mse_att_scale are all 0"
        yield UserError(what, wanted="one above 0", remedy=remedy)
    pairs = (("hidn", hidden, distillation.mse_hidn_module), ("att", attention, distillation.mse_att_module))
    for kind, scale, modules in pairs:
        if bool(scale) != bool(modules):
            yield UserError(
                f"distillation: mse_{kind}_scale and mse_{kind}_module belong together",
                wanted="a scale above 0 with at least one module, or neither",
                got=f"scale {scale:g} with {len(modules)} module(s)",
            )
    if distillation.mse_hidn_proj and not hidden:
        what = "distillation.mse_hidn_proj: there are no hidden states to map"
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
    """Its stages are those of the recipe, and a model that is its own teacher stands still while it teaches."""
    if distillation is None:
        return
    trainings = {entry.name: dataclasses.replace(training, **entry.training) for entry in stages}
    for name in distillation.stages if stages else ():
        if name not in trainings:
            yield UserError(f"distillation.stages: {name} is no stage of the recipe", wanted=", ".join(trainings))
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
    """Why a model cannot be its own teacher in a stage, in words; None if it can."""
    if not stage_name.endswith("_mask"):
        return "it learns no mask"
    return "it trains weights" if training.train_weights else None


def own_teacher_moves(where: str) -> UserError:
    """The error of a model that would teach itself while its weights move."""
    return UserError(
        'distillation.teacher: "self" is the dense model only while its weights stand still; where they are trained '
        "the teacher would move with its student",
        wanted="mask stages with train_weights false",
        got=where,
        remedy='name the mask stages in distillation.stages and set "train_weights": false in their training, or name '
        "the folder of a dense model",
    )
