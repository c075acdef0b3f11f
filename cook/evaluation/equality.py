"""How far two models' logits are apart on the same batches."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from cook.base.batches import Batch
from cook.data.token_loss import model_inputs


@torch.no_grad()
def largest_difference(first: torch.nn.Module, second: torch.nn.Module, batches: Iterable[Batch]) -> float:
    """max |a − b| / max |a| over the logits of all batches; positions beyond a row's `length` do not count.

    Infinity where a logit is not finite, or where all of the first model's are zero and the second's are not.
    """
    difference = scale = 0.0
    seen = False
    for batch in batches:
        inputs = model_inputs(batch)
        a, b = first(**inputs).logits.float(), second(**inputs).logits.float()
        if "length" in batch:
            real = torch.arange(a.shape[1])[None] < batch["length"][:, None]
            a, b = a[real], b[real]
        if not (a.isfinite().all() and b.isfinite().all()):
            return math.inf  # max() would pass over a NaN
        seen = seen or a.numel() > 0
        difference, scale = max(difference, float((a - b).abs().max())), max(scale, float(a.abs().max()))
    assert seen, "nothing to compare the models on"
    return difference / scale if scale else math.inf if difference else 0.0
