"""The held-out loss, which is the same for any world size and batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from cook.base import distributed
from cook.base.batches import Batch, on_device
from cook.data.token_loss import count_targets, model_inputs, summed_cross_entropy


@torch.no_grad()
def held_out_loss(forward: Callable[..., Any], batches: Iterable[Batch], device: torch.device) -> float:
    """Mean cross entropy in nats per target token, over the batches of all ranks.

    Args:
        forward: Takes a batch by name and returns an object with `.logits` (batch, len, vocab).
        batches: This rank's batches, equally many on every rank; `targets` are aligned, −100 is ignored.
        device: The device of the model.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        batch = on_device(batch, device)
        loss = summed_cross_entropy(forward(**model_inputs(batch)).logits, batch)
        total += torch.stack([loss.double(), count_targets(batch).double()]).cpu()
    if distributed.world_size() > 1:
        total = distributed.all_reduce_sum(total.to(device)).cpu()
    assert total[1] > 0, "no held-out tokens"
    return float(total[0] / total[1])
