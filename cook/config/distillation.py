"""The `distillation` section of `bmcook.json`: the teacher and the distillation losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cook.config.declare import Limits, Scale, UserPath
from cook.config.scheme import STAGE_NAMES

ModulePairs = Annotated[
    tuple[
        Annotated[
            str,
            Limits(
                title='"[post]student.module:[post]teacher.module", or [pre] for a module\'s input',
                pattern="^\\[(pre|post)\\][A-Za-z0-9_.]+:\\[(pre|post)\\][A-Za-z0-9_.]+$",
            ),
        ],
        ...,
    ],
    Limits(maxItems=10000),
]
TaughtStage = Annotated[str, Limits(enum=[name for name in STAGE_NAMES if name != "pretrain"])]

TeacherDevice = Literal["auto", "cpu"]

OWN_TEACHER = "self"
"""The `teacher` that stands for the model being trained."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """A dense teacher whose outputs the pruned model imitates."""

    teacher: UserPath
    """Folder of the teacher model, or `self`: the model being trained with all gates open, without a second copy.
    `self` is possible only in mask stages with frozen weights, and in joint stages of several sizes: where these train
    weights, the largest size teaches the others. Write `./self` for a folder of that name."""
    teacher_device: TeacherDevice = "auto"
    """`auto`: the teacher is on the student's device. `cpu`: its weights stay in CPU memory and are copied to the GPU
    one module at a time."""
    stages: Annotated[tuple[TaughtStage, ...], Limits(maxItems=10)] = ()
    """Stages that use the teacher. Empty: all stages except pretrain."""
    ce_scale: Scale = 0.0
    """Weight of the cross-entropy between the teacher's and the student's token distributions."""
    ce_temp: Annotated[float, Limits(exclusiveMinimum=0, maximum=1000)] = 1.0
    """Temperature that softens both distributions."""
    mse_hidn_scale: Scale = 0.0
    """Weight of the mean squared error between hidden states."""
    mse_hidn_module: ModulePairs = ()
    """Pairs `[post]student.module:[post]teacher.module`; `[pre]` is a module's input, `[post]` its output. Both names
    use the layer numbers before any layer was removed, so that a pair means the same block in both models."""
    mse_hidn_proj: bool = False
    """True: if the widths of a pair differ, a linear map from the student's to the teacher's width is learned."""
    mse_att_scale: Scale = 0.0
    """Weight of the mean squared error between the outputs of attention blocks."""
    mse_att_module: ModulePairs = ()
    """Pairs of attention blocks, written like `mse_hidn_module`."""
