"""Distillation: the student imitates a frozen teacher's token distribution and hidden states.

Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (2015), for the softened distributions
and their factor T².
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from cook.base.batches import Batch, CallForm, as_it_is
from cook.base.errors import UserError
from cook.data.losses import model_inputs


def token_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T² · KL(teacher ‖ student) at temperature T, summed over the positions that have a target.

    Args:
        student_logits: `(batch, len, vocab)`.
        teacher_logits: The same shape; carries no gradient.
        targets: `(batch, len)`, −100 where there is nothing to predict.
        temperature: T, divides both logits.
    """
    chosen = targets != -100
    student = F.log_softmax(student_logits[chosen].float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits[chosen].float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True)


def hidden_error(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error a feature, summed over the positions that have a target; states are `(batch, len, dim)`."""
    chosen = targets != -100
    return (student[chosen].float() - teacher[chosen].float()).pow(2).mean(-1).sum()


class RowDistiller:
    """The extra loss of a step where the teacher has read all rows beforehand: it need not read them in every epoch.

    Args:
        logits_RC: The teacher's, for every row, on the student's device.
        scale: Weight of `token_divergence`.
        temperature: Its temperature.
    """

    def __init__(self, logits_RC: torch.Tensor, *, scale: float, temperature: float):
        self._logits_RC, self._scale, self._temperature = logits_RC, scale, temperature

    def __call__(self, batch: Batch, student_logits: torch.Tensor) -> torch.Tensor:
        """The weighted divergence summed over the batch's rows; `rows` holds their numbers."""
        teacher_logits = self._logits_RC[batch["rows"]]
        return self._scale * token_divergence(student_logits, teacher_logits, batch["targets"], self._temperature)


class Distiller:
    """The extra loss of a step, from a batch and the student's logits.

    Args:
        student: The model in training; hooks read the hidden states that `hidden_pairs` names.
        teacher: The dense model, on the student's device; it is put into eval mode and never trained.
        ce_scale: Weight of `token_divergence`.
        ce_temp: Its temperature.
        mse_hidn_scale: Weight of `hidden_error`, summed over the pairs.
        hidden_pairs: `[post]student.module:[post]teacher.module`; `[pre]` takes a module's input.
        call_form: Of the teacher.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: torch.nn.Module,
        *,
        ce_scale: float,
        ce_temp: float,
        mse_hidn_scale: float,
        hidden_pairs: Sequence[str],
        call_form: CallForm = as_it_is,
    ):
        self._teacher, self._call_form = teacher.eval().requires_grad_(False), call_form
        self._ce_scale, self._ce_temp, self._mse_scale = ce_scale, ce_temp, mse_hidn_scale
        pairs = [pair.split(":") for pair in hidden_pairs]
        self._student_taps = [_Tap(student, place) for place, _ in pairs]
        self._teacher_taps = [_Tap(teacher, place) for _, place in pairs]

    def __call__(self, batch: Batch, student_logits: torch.Tensor) -> torch.Tensor:
        """The weighted sum of both losses over the batch's target tokens."""
        targets = batch["targets"]
        with torch.no_grad():
            teacher_logits = self._teacher(**self._call_form(model_inputs(batch))).logits
        loss = student_logits.new_zeros((), dtype=torch.float32)
        if self._ce_scale:
            loss = loss + self._ce_scale * token_divergence(student_logits, teacher_logits, targets, self._ce_temp)
        for mine, wanted in zip(self._student_taps, self._teacher_taps, strict=True):
            loss = loss + self._mse_scale * hidden_error(mine.take(), wanted.take(), targets)
        return loss

    def remove(self) -> None:
        """Takes the hooks off both models."""
        for tap in (*self._student_taps, *self._teacher_taps):
            tap.handle.remove()


class _Tap:
    """Keeps the last input or output of a module."""

    def __init__(self, model: torch.nn.Module, place: str):
        when, path = place[: place.index("]") + 1], place[place.index("]") + 1 :]
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise UserError(f"distillation.mse_hidn_module: the model has no module {path!r}") from None
        self._value: torch.Tensor | None = None
        if when == "[pre]":
            self.handle = module.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        else:
            self.handle = module.register_forward_hook(self._keep_output)

    def _keep_input(self, _module: torch.nn.Module, inputs: tuple, named: dict) -> None:
        self._value = inputs[0] if inputs else named["hidden_states"]  # as transformers calls a layer's blocks

    def _keep_output(self, _module: torch.nn.Module, _inputs: tuple, output: Any) -> None:
        self._value = output[0] if isinstance(output, tuple) else output

    def take(self) -> torch.Tensor:
        assert self._value is not None, "the module did not run"
        value, self._value = self._value, None
        return value
