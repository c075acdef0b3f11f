"""The held-out loss and the outputs for a set of rows, computed on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from cook.base import distributed
from cook.base.batches import Batch, on_device
from cook.data.benchmarks.token_rows import TokenRows, ordered_batches
from cook.data.token_loss import count_targets, model_inputs, summed_cross_entropy


@torch.no_grad()
def held_out_loss(
    forward: Callable[..., Any],
    batches: Iterable[Batch],
    device: torch.device,
    extra_loss: Callable[[Batch, torch.Tensor], torch.Tensor] | None = None,
) -> float:
    """Mean cross entropy in nats per target token; the same for any world size and batch size.

    Args:
        forward: Takes a batch by name and returns an object with `.logits` (batch, len, vocab).
        batches: This rank's batches, equally many on every rank; `targets` are aligned, −100 is ignored.
        device: The device of the model.
        extra_loss: Added to the cross entropy; summed over targets, from a batch and the logits.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        batch = on_device(batch, device)
        logits = forward(**model_inputs(batch)).logits
        loss = summed_cross_entropy(logits, batch)
        loss = loss if extra_loss is None else loss + extra_loss(batch, logits)
        total += torch.stack([loss.double(), count_targets(batch).double()]).cpu()
    if distributed.world_size() > 1:
        total = distributed.all_reduce_sum(total.to(device)).cpu()
    assert total[1] > 0, "no held-out tokens"
    return float(total[0] / total[1])


def predict(
    forward: Callable[..., Any], rows: TokenRows, *, names: tuple[str, ...], batch_size: int, device: torch.device
) -> list[tuple[np.ndarray, ...]]:
    """The named outputs of every row, in the rows' order, on every rank; all ranks call it together.

    `names` are outputs such as `("logits",)`, each `[B, …]`. `batch_size` is per rank.
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
