"""Batches: what a model is called with, by name; tensors, and here and there a switch."""

from __future__ import annotations

from typing import Any

import torch

Batch = dict[str, Any]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The same with its tensors on `device`."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
