"""Preparation of a model before the engine wraps it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def exact_buffers(model: torch.nn.Module, build: Callable[[], torch.nn.Module] | None) -> dict[str, torch.Tensor]:
    """The model's floating-point buffers with their exact values.

    Under half precision ZeRO-3 rounds them when they are created. An example is the frequencies of rotary positions; in
    bf16 they give wrong angles for distant tokens.

    Args:
        model: The model, before the engine wraps it.
        build: Builds a second model to copy from, if the model's buffers are already rounded.
    """
    named = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    if named and build is not None:
        named = {name: buffer for name, buffer in build().named_buffers() if name in named}
    return {name: buffer.detach().clone() for name, buffer in named.items()}


def freeze_all_but_smallest(model: torch.nn.Module) -> None:
    # The engine needs at least one parameter: the smallest one stays trainable, with a learning rate of 0.
    smallest = min(model.parameters(), key=lambda p: getattr(p, "ds_numel", p.numel()))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is smallest)
