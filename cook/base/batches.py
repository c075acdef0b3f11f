"""Batches: what a model is called with, by name; tensors, and here and there a switch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Batch = dict[str, Any]
CallForm = Callable[[Batch], Batch]
"""Makes a model's call of a batch in CPM-Live's form, labels excepted: what a family takes differs."""


def as_it_is(batch: Batch) -> Batch:
    """The call form of a model that takes the batch itself."""
    return batch


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The same with its tensors on `device`."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
