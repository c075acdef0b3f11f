"""How far two models' logits are apart on the same batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch


@torch.no_grad()
def largest_difference(
    first: torch.nn.Module, second: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]]
) -> float:
    """max |a − b| / max |a| over the logits of all batches; positions beyond a row's `length` do not count."""
    difference = scale = 0.0
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "targets"}
        a, b = first(**inputs).logits.float(), second(**inputs).logits.float()
        if "length" in batch:
            real = torch.arange(a.shape[1])[None] < batch["length"][:, None]
            a, b = a[real], b[real]
        difference, scale = max(difference, float((a - b).abs().max())), max(scale, float(a.abs().max()))
    return difference / scale
