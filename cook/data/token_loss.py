"""The loss of a batch, summed over its targets: tokens, and the right options of questions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from cook.data.packing import NO_TARGET

LABELS = ("targets", "choices", "choice_token", "rows")
"""Keys of a batch for the targets and the row numbers. All other keys are inputs of the model."""


def model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if key not in LABELS}


def summed_cross_entropy(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy in fp32, in nats, summed over the batch's targets; a question counts as one.

    Args:
        logits: (B, L, vocabulary).
        batch: `targets` int64 (B, L), -100 where there is none; where there are questions also `choices` int64 (B, L),
            at the last token of an option twice the question's number in the row, and one more if the option is right,
            elsewhere -1, and `choice_token` int64 (B,), the id whose logit is an option's score.
    """
    targets = batch["targets"].flatten()
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=NO_TARGET, reduction="sum")
    return loss + _questions(logits, batch) if "choices" in batch else loss


def count_targets(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How many targets `summed_cross_entropy` sums over: int64 ()."""
    count = (batch["targets"] != NO_TARGET).sum()
    if "choices" in batch:
        count = count + ((batch["choices"] >= 0) & (batch["choices"] % 2 == 1)).sum()
    return count


def _questions(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of the right option among its question's options, summed over the questions."""
    choices = batch["choices"]
    row, position = (choices >= 0).nonzero(as_tuple=True)
    number = choices[row, position]
    score = logits[row, position, batch["choice_token"][row]].float()
    question, place = torch.unique(row * choices.shape[1] + number // 2, return_inverse=True)
    highest = score.new_full(question.shape, -torch.inf).scatter_reduce(0, place, score.detach(), "amax")
    total = score.new_zeros(question.shape).index_add(0, place, (score - highest[place]).exp())
    return (highest + total.log()).sum() - score[number % 2 == 1].sum()
