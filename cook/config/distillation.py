"""The `distillation` section of `bmcook.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cook.config.corpus import UserPath

TeacherDevice = Literal["auto", "cpu"]

OWN_TEACHER = "self"
"""A `teacher` that is the model in training itself."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """A dense teacher whose outputs the pruned model imitates."""

    teacher: UserPath
    """Folder of the teacher model; or `self`: the model in training with all its gates open, without a second copy, in
    mask stages whose weights are frozen. (A folder of that name is `./self`.)"""

    teacher_device: TeacherDevice = "auto"
    """`auto`: the teacher lies where the student is; `cpu`: its weights stay in the CPU's memory and visit the GPU one
    module at a time."""

    stages: tuple[str, ...] = ()
    """Stages that have the teacher. Empty: all but pretrain."""

    ce_scale: float = 0.0
    """Weight of the cross entropy between the teacher's and the student's token distributions."""

    ce_temp: float = 1.0
    """Temperature that softens both distributions."""

    mse_hidn_scale: float = 0.0
    """Weight of the mean squared error between hidden states."""

    mse_hidn_module: tuple[str, ...] = ()
    """Pairs `[post]student.module:[post]teacher.module`; `[pre]` takes a module's input, `[post]` its output. Both
    names count layers as the model did before any was removed: a pair means the same block in both."""

    mse_hidn_proj: bool = False
    """True: where the widths of a pair differ, a linear map from the student's to the teacher's is learned."""

    mse_att_scale: float = 0.0
    """Weight of the mean squared error between the outputs of attention blocks."""

    mse_att_module: tuple[str, ...] = ()
    """Pairs of attention blocks, written like `mse_hidn_module`."""
