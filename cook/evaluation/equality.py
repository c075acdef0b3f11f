"""How far two models' answers are apart on the same batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from cook.base.batches import Batch
from cook.data.token_loss import model_inputs

Answers = dict[str, torch.Tensor]
"""What a model returns for one batch, by name: logits, the logits of a span's ends, hidden states of a bare encoder."""


@torch.no_grad()
def answers(model: torch.nn.Module, batches: Iterable[Batch]) -> list[Answers]:
    """A model's answers to all batches, in fp32; positions beyond a row's `length` are left out."""
    found: list[Answers] = []
    for batch in batches:
        out = model(**_call(model, model_inputs(batch)))
        named = out.items() if hasattr(out, "items") else vars(out).items()
        values = {name: value.float() for name, value in named if _is_answer(value)}
        if "length" in batch:
            length = next(iter(values.values())).shape[1]
            real = torch.arange(length)[None] < batch["length"][:, None]
            values = {name: value[real] for name, value in values.items()}
        found.append(values)
    return found


def difference(first: Sequence[Answers], second: Sequence[Answers]) -> float:
    """max |a − b| / max |a| over all batches, of the answer for which it is largest.

    Infinity where a number is not finite, or where all of the first model's are zero and the second's are not.
    """
    assert any(value.numel() for answer in first for value in answer.values()), "nothing to compare the models on"
    names = {name for answer in (*first, *second) for name in answer}
    return max(_difference([(a[name], b[name]) for a, b in zip(first, second, strict=True)]) for name in names)


def largest_difference(first: torch.nn.Module, second: torch.nn.Module, batches: Iterable[Batch]) -> float:
    """`difference` of two models that are both in memory."""
    batches = list(batches)
    return difference(answers(first, batches), answers(second, batches))


def _difference(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    apart = scale = 0.0
    for a, b in pairs:
        if not (a.isfinite().all() and b.isfinite().all()):
            return math.inf  # max() would pass over a NaN
        if a.numel():
            apart, scale = max(apart, float((a - b).abs().max())), max(scale, float(a.abs().max()))
    return apart / scale if scale else math.inf if apart else 0.0


def _is_answer(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _call(model: torch.nn.Module, inputs: Batch) -> Batch:
    if not any(made.__name__.endswith("ForMultipleChoice") for made in type(model).__mro__):
        return inputs
    # Its rows are the choices of one question, and its masks have no room for pairs of positions.
    return {name: inputs[name][None] for name in ("input_ids", "position_ids") if name in inputs}
