"""Task losses: sums over a batch's targets, from a model's output and the batch; the step divides by the count.

B rows, T tokens, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from cook.data.token_loss import summed_cross_entropy

Batch = Mapping[str, torch.Tensor]
TaskLoss = Callable[[Any, Batch], torch.Tensor]


def token_loss(output: Any, batch: Batch) -> torch.Tensor:
    """Language modelling: cross entropy of `output.logits` `[B, T, V]`, and of the options of questions."""
    return summed_cross_entropy(output.logits, batch)


def class_loss(output: Any, batch: Batch) -> torch.Tensor:
    """Classification of rows: cross entropy of `output.logits` `[B, C]` and `targets` `[B]`."""
    return F.cross_entropy(output.logits.float(), batch["targets"], reduction="sum")


def score_loss(output: Any, batch: Batch) -> torch.Tensor:
    """Regression: squared error of `output.logits` `[B, 1]` and `targets` `[B]`."""
    return F.mse_loss(output.logits.float().squeeze(-1), batch["targets"], reduction="sum")


def span_loss(output: Any, batch: Batch) -> torch.Tensor:
    """Answer spans: mean of the cross entropies of `start_logits` and `end_logits` `[B, T]`; `targets` `[B, 2]`."""
    starts, ends = output.start_logits.float(), output.end_logits.float()
    first, last = batch["targets"].unbind(-1)
    return (F.cross_entropy(starts, first, reduction="sum") + F.cross_entropy(ends, last, reduction="sum")) / 2
