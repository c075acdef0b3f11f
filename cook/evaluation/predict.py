"""A model's outputs for a set of rows, computed on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cook.base import distributed
from cook.data.benchmarks.token_rows import TokenRows, ordered_batches
from cook.data.token_loss import model_inputs


def predict(
    forward: Callable[..., Any], rows: TokenRows, *, names: tuple[str, ...], batch_size: int, device: torch.device
) -> list[tuple[np.ndarray, ...]]:
    """The named outputs of every row, in the rows' order, on every rank; all ranks call it together.

    Args:
        forward: The model, in eval mode.
        rows: The rows.
        names: Names of the outputs to keep, such as `("logits",)`; each is `[B, …]`.
        batch_size: Rows per batch and rank.
        device: The device of the model.
    """
    found: dict[int, tuple[np.ndarray, ...]] = {}
    with torch.no_grad():
        for indices in ordered_batches(rows, batch_size, distributed.rank(), distributed.world_size()):
            batch = {key: value.to(device) for key, value in model_inputs(rows.batch(indices)).items()}
            output = forward(**batch)
            values = [getattr(output, name).float().cpu().numpy() for name in names]
            found |= {int(index): tuple(value[row] for value in values) for row, index in enumerate(indices)}
    gathered: dict[int, tuple[np.ndarray, ...]] = {}
    for part in distributed.gather(found):
        gathered |= part
    return [gathered[index] for index in range(len(rows))]
