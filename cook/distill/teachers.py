"""Teachers: frozen models that are distilled from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cook.base.batches import Batch, CallForm, as_it_is
from cook.data.token_loss import model_inputs


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model to distil from; it may be the student itself."""

    module: torch.nn.Module  # the module whose hidden states are read
    forward: Callable[[Batch], Any]
    """Computes its output with `.logits` for a batch without labels; without gradients or dropout."""


def model_teacher(model: torch.nn.Module, call_form: CallForm = as_it_is) -> Teacher:
    """A separate model, frozen and in eval mode, on the device of the batches or streamed to it."""
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(batch: Batch) -> Any:
        return model(**call_form(model_inputs(batch)))

    return Teacher(module=model, forward=forward)


def stream_weights(model: torch.nn.Module, device: torch.device) -> None:
    """Keeps a model's weights where they are, and copies each to `device` only while its module runs.

    For a frozen teacher that does not fit beside the student: the device holds the weights of one module at a time.
    Buffers, which are small, are moved permanently. A module may use only its own weights in its `forward`,
    as under ZeRO-3. A weight that several modules share is copied for each of them.
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
            if device.type == "cuda" and not parameter.is_pinned():
                parameter.data = parameter.data.pin_memory()  # without pinning, the copy would wait for the CPU
        self._homes = [parameter.data for parameter in parameters]

    def begin(self, *_: Any) -> None:
        for parameter, home in zip(self._parameters, self._homes, strict=True):
            parameter.data = home.to(self._device, non_blocking=True)

    def end(self, *_: Any) -> None:
        for parameter, home in zip(self._parameters, self._homes, strict=True):
            parameter.data = home
