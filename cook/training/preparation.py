"""What is done to a model before the engine takes it, and what the engine must not change."""

from __future__ import annotations

from collections.abc import Callable

import torch


def exact_buffers(model: torch.nn.Module, build: Callable[[], torch.nn.Module] | None) -> dict[str, torch.Tensor]:
    """The model's floating buffers, exact.

    Under half precision ZeRO-3 rounds them while they are made: the frequencies of rotary positions, for one, which in
    bf16 put distant tokens at wrong angles.

    Args:
        model: The model, not yet in the engine's hands.
        build: Makes another one, to copy from, if the model's own are rounded already.
    """
    named = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    if named and build is not None:
        named = {name: buffer for name, buffer in build().named_buffers() if name in named}
    return {name: buffer.detach().clone() for name, buffer in named.items()}


def freeze_all_but_smallest(model: torch.nn.Module) -> None:
    # The engine needs something to optimise: the smallest parameter stays in its hands with a learning rate of 0.
    smallest = min(model.parameters(), key=lambda p: getattr(p, "ds_numel", p.numel()))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is smallest)
