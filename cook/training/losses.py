"""The tasks' losses, from a model's output and a batch's targets to a sum over targets; the step divides by its count.

B rows, T tokens, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

TaskLoss = Callable[[Any, torch.Tensor], torch.Tensor]


def token_loss(output: Any, targets_BT: torch.Tensor) -> torch.Tensor:
    """Language modelling: cross entropy of `output.logits` `[B, T, V]`; a target of -100 does not count."""
    logits = output.logits.flatten(0, 1).float()
    return F.cross_entropy(logits, targets_BT.flatten(), ignore_index=-100, reduction="sum")


def class_loss(output: Any, targets_B: torch.Tensor) -> torch.Tensor:
    """Classification of rows: cross entropy of `output.logits` `[B, C]`."""
    return F.cross_entropy(output.logits.float(), targets_B, reduction="sum")


def score_loss(output: Any, targets_B: torch.Tensor) -> torch.Tensor:
    """Regression: squared error of `output.logits` `[B, 1]`."""
    return F.mse_loss(output.logits.float().squeeze(-1), targets_B, reduction="sum")


def span_loss(output: Any, targets_B2: torch.Tensor) -> torch.Tensor:
    """Answer spans: the mean of the cross entropies of `output.start_logits` and `output.end_logits`, `[B, T]`."""
    starts, ends = output.start_logits.float(), output.end_logits.float()
    first, last = targets_B2.unbind(-1)
    return (F.cross_entropy(starts, first, reduction="sum") + F.cross_entropy(ends, last, reduction="sum")) / 2
