"""The difference between two models' outputs on the same batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from cook.base.batches import Batch
from cook.data.token_loss import model_inputs

Answers = dict[str, torch.Tensor]
"""A model's outputs for one batch, by name: logits, span logits, or the hidden states of an encoder without a head."""


@torch.no_grad()
def answers(model: torch.nn.Module, batches: Iterable[Batch]) -> list[Answers]:
    """A model's outputs for all batches, in fp32; positions beyond a row's `length` are left out."""
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
    """max |a − b| / max |a| over all batches, for the output for which it is largest.

    Infinity if a number is not finite, or if all numbers of the first model are zero and those of the second are not.
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
            return math.inf  # max() would ignore a NaN
        if a.numel():
            apart, scale = max(apart, float((a - b).abs().max())), max(scale, float(a.abs().max()))
    return apart / scale if scale else math.inf if apart else 0.0


def _is_answer(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _call(model: torch.nn.Module, inputs: Batch) -> Batch:
    if not any(made.__name__.endswith("ForMultipleChoice") for made in type(model).__mro__):
        return inputs
    # Its rows are the choices of one question, and it does not accept 2D attention masks.
    return {name: inputs[name][None] for name in ("input_ids", "position_ids") if name in inputs}
