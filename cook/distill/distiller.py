"""Distillation from a frozen teacher: losses of token distributions, hidden states and attention blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cook.base.batches import Batch, CallForm, as_it_is
from cook.data.token_loss import model_inputs
from cook.distill.taps import Pair, Tap, check_pairs, raise_pairs
from cook.distill.teacher_loss import Projections, hidden_error, token_divergence


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model to distil from; it may be the student itself."""

    module: torch.nn.Module  # the module whose hidden states are read
    forward: Callable[[Batch], Any]  # its output, with `.logits`, for a batch; without gradients or dropout


def model_teacher(model: torch.nn.Module, call_form: CallForm = as_it_is) -> Teacher:
    """A separate model, frozen and in eval mode, on the device of the batches or streamed to it."""
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(batch: Batch) -> Any:
        return model(**call_form(model_inputs(batch)))

    return Teacher(module=model, forward=forward)


def stream_weights(model: torch.nn.Module, device: torch.device) -> None:
    """Keeps a frozen model's weights where they are, and copies each to `device` only while its module runs.

    Buffers, which are small, are moved permanently. A module may use only its own weights in its `forward`, as under
    ZeRO-3. A weight that several modules share is copied for each of them.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        own = list(module.parameters(recurse=False))
        if own:
            visits = _Visits(own, device)
            module.register_forward_pre_hook(visits.begin)
            module.register_forward_hook(visits.end, always_call=True)


class _Visits:
    """The weights of one module, which are copied to the device and back."""

    def __init__(self, parameters: list[torch.nn.Parameter], device: torch.device):
        self._parameters, self._device = parameters, device
        for parameter in parameters:
            if device.type != "cpu" and not parameter.is_pinned():
                parameter.data = parameter.data.pin_memory()  # without pinning, the copy would wait for the CPU
        self._homes = [parameter.data for parameter in parameters]

    def begin(self, *_: Any) -> None:
        for parameter, home in zip(self._parameters, self._homes, strict=True):
            parameter.data = home.to(self._device, non_blocking=True)

    def end(self, *_: Any) -> None:
        for parameter, home in zip(self._parameters, self._homes, strict=True):
            parameter.data = home


class RowDistiller:
    """The extra loss of a step from `logits_RC`, the teacher's logits of all rows, on the student's device."""

    def __init__(self, logits_RC: torch.Tensor, *, scale: float, temperature: float):
        self._logits_RC, self._scale, self._temperature = logits_RC, scale, temperature

    def prepare(self, batch: Batch) -> None:
        """Nothing: the teacher has computed already."""

    def __call__(self, batch: Batch, student_logits: torch.Tensor) -> torch.Tensor:
        """The weighted divergence summed over the batch's rows; `batch["rows"]` holds their indices."""
        teacher_logits = self._logits_RC[batch["rows"]]
        return self._scale * token_divergence(student_logits, teacher_logits, batch["targets"], self._temperature)


class Distiller:
    """The extra loss of a step, computed from a batch and the student's logits.

    Args:
        student: The model in training; hooks read the states that the pairs name, in forward passes with gradients.
        teacher: The model to imitate.
        ce_scale, ce_temp: Weight and temperature of `token_divergence`.
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
        self._prepared: tuple[torch.Tensor, list[Any]] | None = None
        # Hooks the whole model: neither the backward pass nor the model as its own teacher calls it again.
        self._handle = student.register_forward_pre_hook(self._begin)

    def _begin(self, *_: Any) -> None:
        for tap in self._student_taps if torch.is_grad_enabled() else ():
            tap.arm()

    def prepare(self, batch: Batch) -> None:
        """The teacher's forward pass, for the next call."""
        for tap in self._teacher_taps:
            tap.arm()
        logits = self._teacher.forward(batch).logits
        self._prepared = logits, [tap.take() for tap in self._teacher_taps]

    def __call__(self, batch: Batch, student_logits: torch.Tensor) -> torch.Tensor:
        """The weighted sum of all losses over the batch's target tokens; a UserError if states cannot be compared."""
        targets = batch["targets"]
        student_states = [tap.take() for tap in self._student_taps]
        if self._prepared is None:
            self.prepare(batch)
        assert self._prepared is not None
        (wanted_logits, teacher_states), self._prepared = self._prepared, None
        self._check(student_states, teacher_states, targets)
        loss = student_logits.new_zeros((), dtype=torch.float32)
        if self._ce_scale:
            loss = loss + self._ce_scale * token_divergence(student_logits, wanted_logits, targets, self._ce_temp)
        for (pair, scale, projections), own, its in zip(self._pairs, student_states, teacher_states, strict=True):
            if own.shape[-1] == its.shape[-1]:
                error = hidden_error(own, its, targets)
            else:
                assert projections is not None, "checked above"
                project = partial(projections.apply, str(pair), width=its.shape[-1])
                error = hidden_error(own, its, targets, project)
            loss = loss + scale * error
        return loss

    def _check(self, student_states: list[Any], teacher_states: list[Any], targets: torch.Tensor) -> None:
        problems = []
        for (pair, _, projections), own, its in zip(self._pairs, student_states, teacher_states, strict=True):
            sides = (("student's", own), ("teacher's", its))
            faults = [f"{who} {fault}" for who, states in sides if (fault := _fault(states, targets))]
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
