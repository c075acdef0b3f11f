"""Teachers: models that are asked and never trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cook.base.batches import Batch, CallForm, as_it_is
from cook.data.token_loss import model_inputs


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model to imitate; it may be the student itself."""

    module: torch.nn.Module
    """Where its hidden states are read."""
    forward: Callable[[Batch], Any]
    """Its output with `.logits` for a batch of which the labels are taken out; without gradients or dropout."""


def model_teacher(model: torch.nn.Module, call_form: CallForm = as_it_is) -> Teacher:
    """A model of its own, put into eval mode and frozen; it lies where the batches are, or streams itself there."""
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(batch: Batch) -> Any:
        return model(**call_form(model_inputs(batch)))

    return Teacher(module=model, forward=forward)


def stream_weights(model: torch.nn.Module, device: torch.device) -> None:
    """Keeps a model's weights where they are and lets each visit `device` only while its own module runs.

    For a frozen teacher that does not fit beside the student: at any time the device holds the weights of one module.
    Buffers, which are small, move for good. A module may use none but its own weights outside their owner's `forward`,
    as under ZeRO-3. A weight that several modules share visits for each of them.
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
    """The weights of one module, at home and away."""

    def __init__(self, parameters: list[torch.nn.Parameter], device: torch.device):
        self._parameters, self._device = parameters, device
        for parameter in parameters:
            if device.type == "cuda" and not parameter.is_pinned():
                parameter.data = parameter.data.pin_memory()  # else a copy waits for the CPU
        self._homes = [parameter.data for parameter in parameters]

    def begin(self, *_: Any) -> None:
        for parameter, home in zip(self._parameters, self._homes, strict=True):
            parameter.data = home.to(self._device, non_blocking=True)

    def end(self, *_: Any) -> None:
        for parameter, home in zip(self._parameters, self._homes, strict=True):
            parameter.data = home
