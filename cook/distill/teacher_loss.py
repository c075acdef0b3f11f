"""Losses between student and teacher: divergence of token distributions, and error of hidden states.

`Projections` map hidden states of the student where their size differs from the teacher's.

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

from cook.base.seeds import generator
from cook.data.packing import NO_TARGET

CHUNK, CHUNK_ON_CPU = 1 << 26, 1 << 20
"""Logits per chunk that is copied to fp32: fits in a core's cache on CPUs, large enough to keep a GPU busy."""
LEARNING_RATE = 1e-3  # Adam's default; the maps start at random and have no schedule


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
        chunk = CHUNK_ON_CPU if student_NV.device.type == "cpu" else CHUNK
        for positions in with_target.split(max(1, chunk // vocab)):
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


class Projections:
    """The linear maps of all pairs whose hidden sizes differ, the same on every rank.

    Like the gates they are outside the engine: replicated, in fp32, with their own optimizer, without clipping. They
    are created when the sizes are first known, from the seed and the pair's name. The student is mapped, because a map
    of the teacher could reduce the error by mapping everything to zero.
    """

    def __init__(self, *, seed: int, device: torch.device | str = "cpu"):
        self._seed, self._device = seed, torch.device(device)
        self.weights: dict[str, torch.Tensor] = {}  # by the pair's name, `[teacher's width, student's width]`, fp32
        self._optimizer: torch.optim.Adam | None = None

    def apply(self, name: str, states: torch.Tensor, width: int) -> torch.Tensor:
        """Maps fp32 states `(..., student's width)` to `(..., width)`; creates the map if `name` has none."""
        if name not in self.weights:
            assert self._optimizer is None, "a map that appears after the first update"
            own = states.shape[-1]
            self._set(name, torch.randn(width, own, generator=generator(self._seed, "projection", name)) / own**0.5)
        return F.linear(states, self.weights[name])

    def gradient(self) -> torch.Tensor | None:
        """Returns the accumulated ∂L/∂weights of all maps as one fp32 vector, and clears it."""
        if not self.weights:
            return None
        parts = []
        for weight in self.weights.values():
            parts.append((torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten())
            weight.grad = None
        return torch.cat(parts)

    def update(self, gradient: torch.Tensor) -> None:
        """Updates the maps by `gradient`, in the form of `self.gradient`, averaged over ranks and micro-batches."""
        optimizer = self._optimizer = self._optimizer or self._made_optimizer()
        parts = gradient.split([weight.numel() for weight in self.weights.values()])
        for weight, part in zip(self.weights.values(), parts, strict=True):
            weight.grad = part.view_as(weight)
        optimizer.step()
        optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        weights = {name: weight.detach().cpu().clone() for name, weight in self.weights.items()}
        return {"weights": weights, "optimizer": self._optimizer.state_dict() if self._optimizer else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self._optimizer = {}, None
        for name, weight in state["weights"].items():
            self._set(name, weight)
        if state["optimizer"] is not None:
            self._optimizer = self._made_optimizer()
            self._optimizer.load_state_dict(state["optimizer"])

    def _set(self, name: str, weight: torch.Tensor) -> None:
        self.weights[name] = weight.to(self._device, torch.float32).clone().requires_grad_()

    def _made_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(list(self.weights.values()), lr=LEARNING_RATE)
