"""Losses between student and teacher: divergence of token distributions, and error of hidden states.

Source of the softened distributions and their factor T²: Hinton, Vinyals and Dean, "Distilling the knowledge in a
neural network" (2015).

Shape suffixes: N positions of all rows, V vocabulary, C positions of one chunk that have a target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from cook.data.packing import NO_TARGET

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits per chunk that is copied to fp32: fits in a core's cache on CPUs, large enough to keep a GPU busy."""


def token_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T² · KL(teacher ‖ student) at temperature T, summed over the positions that have a target.

    Computed in chunks: it keeps only one tensor as large as the logits, their gradient, in the type of the logits (fp32
    for fp16, whose smallest numbers are too large before the loss is scaled).

    Args:
        student_logits: `(batch, len, vocab)`, or `(batch, classes)` with targets `(batch,)`.
        teacher_logits: The same shape; no gradient.
        targets: `(batch, len)`, −100 at positions without a target.
        temperature: T, by which both logits are divided.
    """
    return _Divergence.apply(
        student_logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2), _target_positions(targets), temperature
    )


def hidden_error(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    project: Callable[[torch.Tensor], torch.Tensor] = lambda states: states,
) -> torch.Tensor:
    """Mean squared error per feature, in fp32, summed over the positions that have a target.

    Args:
        student: `(batch, len, dim)`.
        teacher: The same shape; another dim only with a projection.
        targets: `(batch, len)`, −100 at positions without a target.
        project: Maps the student's states `(positions, dim)` to the teacher's dim.
    """
    with_target = _target_positions(targets)
    mine, wanted = (
        states.flatten(0, -2).index_select(0, with_target).float() for states in (student, teacher.detach())
    )
    return (project(mine) - wanted).pow(2).mean(-1).sum()


def _target_positions(targets: torch.Tensor) -> torch.Tensor:
    return (targets.flatten() != NO_TARGET).nonzero().flatten()


class _Divergence(torch.autograd.Function):
    """The gradient of T²·KL is T·(softmax(s/T) − softmax(t/T)), which is computed together with the value."""

    @staticmethod
    def forward(
        ctx: Any, student_NV: torch.Tensor, teacher_NV: torch.Tensor, with_target: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        count, vocab = student_NV.shape
        gradient_NV = None
        if ctx.needs_input_grad[0]:
            dtype = torch.float32 if student_NV.dtype == torch.float16 else student_NV.dtype
            make = torch.empty if len(with_target) == count else torch.zeros
            gradient_NV = make((count, vocab), dtype=dtype, device=student_NV.device)
        total = student_NV.new_zeros((), dtype=torch.float32)
        for positions in with_target.split(max(1, CHUNK.get(student_NV.device.type, CHUNK["cuda"]) // vocab)):
            student_CV, teacher_CV = (
                F.log_softmax(x.index_select(0, positions).float().div_(temperature), dim=-1)
                for x in (student_NV, teacher_NV)
            )
            wanted_CV = teacher_CV.exp()
            total += torch.dot(wanted_CV.flatten(), teacher_CV.sub_(student_CV).flatten())
            if gradient_NV is not None:
                part_CV = student_CV.exp_().sub_(wanted_CV).mul_(temperature)
                gradient_NV.index_copy_(0, positions, part_CV.to(gradient_NV.dtype))
        ctx.gradient_NV, ctx.dtype = gradient_NV, student_NV.dtype
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        assert ctx.gradient_NV is not None, "a second backward pass through one divergence"
        gradient_NV, ctx.gradient_NV = ctx.gradient_NV, None  # scaled in place: it is as large as the logits
        return gradient_NV.mul_(scale).to(ctx.dtype), None, None, None
