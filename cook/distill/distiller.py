"""Distillation losses from a frozen teacher: token distribution, hidden states and attention blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from cook.base.batches import Batch
from cook.distill.projections import Projections
from cook.distill.taps import Pair, Tap, check_pairs, raise_pairs
from cook.distill.teacher_loss import hidden_error, token_divergence
from cook.distill.teachers import Teacher


class RowDistiller:
    """The extra loss of a step with teacher logits that were computed once for all rows.

    Args:
        logits_RC: The teacher's logits for every row, on the student's device.
        scale: Weight of `token_divergence`.
        temperature: The temperature of `token_divergence`.
    """

    def __init__(self, logits_RC: torch.Tensor, *, scale: float, temperature: float):
        self._logits_RC, self._scale, self._temperature = logits_RC, scale, temperature

    def __call__(self, batch: Batch, student_logits: torch.Tensor) -> torch.Tensor:
        """The weighted divergence summed over the batch's rows; `batch["rows"]` holds their indices."""
        teacher_logits = self._logits_RC[batch["rows"]]
        return self._scale * token_divergence(student_logits, teacher_logits, batch["targets"], self._temperature)


class Distiller:
    """The extra loss of a step, computed from a batch and the student's logits.

    Args:
        student: The model in training; hooks read the states that the pairs name, in forward passes with gradients.
        teacher: The model to imitate.
        ce_scale: Weight of `token_divergence`.
        ce_temp: The temperature of `token_divergence`.
        mse_hidn_scale: Weight of `hidden_error`, summed over the hidden pairs.
        hidden_pairs: Pairs of places whose states `(rows, positions, width)` are compared.
        projections: Linear maps between hidden states of different widths; None if none are allowed.
        mse_att_scale: Weight of `hidden_error`, summed over the attention pairs.
        attention_pairs: The same for the outputs of attention blocks.

    Raises:
        UserError: a module that a pair names does not exist.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: Teacher,
        *,
        ce_scale: float,
        ce_temp: float,
        mse_hidn_scale: float = 0.0,
        hidden_pairs: Sequence[Pair] = (),
        projections: Projections | None = None,
        mse_att_scale: float = 0.0,
        attention_pairs: Sequence[Pair] = (),
    ):
        keyed = {"mse_hidn_module": hidden_pairs, "mse_att_module": attention_pairs}
        check_pairs(keyed, student, teacher.module)
        self.projections = projections
        self._teacher, self._ce_scale, self._ce_temp = teacher, ce_scale, ce_temp
        self._pairs = [(pair, mse_hidn_scale, projections) for pair in hidden_pairs]
        self._pairs += [(pair, mse_att_scale, None) for pair in attention_pairs]
        self._student_taps = [Tap(student, pair.student) for pair, *_ in self._pairs]
        self._teacher_taps = [Tap(teacher.module, pair.teacher) for pair, *_ in self._pairs]
        # Hooks the whole model: neither the backward pass nor the model as its own teacher calls it
        # again.
        self._handle = student.register_forward_pre_hook(self._begin)

    def _begin(self, *_: Any) -> None:
        for tap in self._student_taps if torch.is_grad_enabled() else ():
            tap.arm()

    def __call__(self, batch: Batch, student_logits: torch.Tensor) -> torch.Tensor:
        """The weighted sum of all losses over the batch's target tokens.

        Raises:
            UserError: on every rank, if states cannot be compared.
        """
        targets = batch["targets"]
        mine = [tap.take() for tap in self._student_taps]
        for tap in self._teacher_taps:
            tap.arm()
        wanted_logits = self._teacher.forward(batch).logits
        wanted = [tap.take() for tap in self._teacher_taps]
        self._check(mine, wanted, targets)
        loss = student_logits.new_zeros((), dtype=torch.float32)
        if self._ce_scale:
            loss = loss + self._ce_scale * token_divergence(student_logits, wanted_logits, targets, self._ce_temp)
        for (pair, scale, projections), own, its in zip(self._pairs, mine, wanted, strict=True):
            if own.shape[-1] == its.shape[-1]:
                error = hidden_error(own, its, targets)
            else:
                assert projections is not None, "checked above"
                project = partial(projections.apply, str(pair), width=its.shape[-1])
                error = hidden_error(own, its, targets, project)
            loss = loss + scale * error
        return loss

    def _check(self, mine: list[Any], wanted: list[Any], targets: torch.Tensor) -> None:
        problems = []
        for (pair, _, projections), own, its in zip(self._pairs, mine, wanted, strict=True):
            faults = [
                f"{who} {_fault(states, targets)}"
                for who, states in (("student's", own), ("teacher's", its))
                if _fault(states, targets)
            ]
            if not faults and own.shape[-1] != its.shape[-1] and projections is None:
                faults.append(f"widths differ, {own.shape[-1]} and {its.shape[-1]}")
            problems += [f"{pair}: the {fault}" for fault in faults]
        if problems:
            raise_pairs(
                problems,
                "tensors of (rows, positions, width) with equal widths",
                "name other modules; if hidden sizes differ, set mse_hidn_proj to true",
            )

    def remove(self) -> None:
        """Removes the hooks from both models."""
        self._handle.remove()
        for tap in (*self._student_taps, *self._teacher_taps):
            tap.remove()


def _fault(states: Any, targets: torch.Tensor) -> str | None:
    if states is None:
        return "module is not called in the model's forward pass"
    if not torch.is_tensor(states):
        return f"module returns a {type(states).__name__}"
    if states.shape[:-1] != targets.shape:
        return f"module returns a tensor of shape {tuple(states.shape)}"
    return None
