"""Batches: the keyword arguments of a model's forward call, which are tensors and a few flags."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Batch = dict[str, Any]
CallForm = Callable[[Batch], Batch]
"""Turns a batch in CPM-Live's form, without its labels, into the keyword arguments that a model family takes."""


def as_it_is(batch: Batch) -> Batch:
    """Returns `batch` unchanged: the call form of a model that takes CPM-Live's batches."""
    return batch


def on_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """Returns a copy of `batch` whose tensors are on `device`."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def divisors(number: int) -> list[int]:
    """All divisors of a number above 0, ascending: the sizes of micro-batches that divide a share evenly."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
