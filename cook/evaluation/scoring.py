"""The loss of a causal language model on a text, in disjoint or overlapping windows."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from cook.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Windowing:
    """How a text that is longer than the model's context is cut into windows."""

    size: int
    """Tokens per window."""
    stride: int | None = None
    """None: disjoint windows (Frantar et al. 2022, GPTQ, and later pruning papers); the first token of a window is not
    predicted, and an incomplete last window is left out. A number: each window begins that many tokens after the
    previous one, and only tokens that earlier windows did not predict count (Baevski and Auli 2019; "sliding window" in
    Press et al. 2021). Every token of the text but the first is then predicted exactly once, from the second window on
    with at least `size - stride` tokens before it."""
    bos: int | None = None
    """An id put in front of every window, so that its first token is predicted too; it counts in `size`."""
    limit: int | None = None
    """Score at most this many windows."""

    @property
    def method(self) -> str:
        """`windowed` or `strided`."""
        return "windowed" if self.stride is None else "strided"


@dataclass(frozen=True, kw_only=True)
class Span:
    """One window: the tokens [start, stop) of the text, of which [scored, stop) count."""

    start: int
    stop: int
    scored: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a model on a text."""

    loss: float
    """Mean cross entropy in nats per predicted token."""
    tokens: int
    """Predicted tokens."""
    seen: int
    """Tokens that the model processed; tokens in several windows count once per window."""
    seconds: float
    """Seconds in the model and the loss."""

    @property
    def perplexity(self) -> float:
        """exp(loss) (Jelinek et al. 1977); infinity on overflow."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def spans(count: int, windowing: Windowing) -> list[Span]:
    """The windows over a text of `count` tokens, in order.

    Raises:
        UserError: the text is shorter than one window (disjoint windows), or too short to predict anything (strided).
    """
    size = windowing.size - (windowing.bos is not None)
    assert windowing.stride is None or 1 <= windowing.stride <= size, "the stride would skip tokens between windows"
    free = int(windowing.bos is None)  # tokens at the start of a text that are not predicted
    if windowing.stride is None:
        found = [Span(start=s, stop=s + size, scored=s + free) for s in range(0, count - size + 1, size)]
    else:
        found, done = [], free
        for start in range(0, count, windowing.stride):
            stop = min(start + size, count)
            # If the stride equals the window, the first token of a window is not predicted.
            first = max(done, start + free)
            if first < stop:
                found.append(Span(start=start, stop=stop, scored=first))
            done = stop
    if not found:
        least = size if windowing.stride is None else 1 + free
        raise UserError(f"the text has {count} tokens, fewer than a window of {least}", remedy="set --window lower")
    return found[: windowing.limit]


def batches(found: Sequence[Span], batch_size: int) -> Iterator[list[Span]]:
    """Groups windows of equal length, at most `batch_size` each: without padding, which some models count as text."""
    for _, equal in itertools.groupby(found, key=lambda span: span.stop - span.start):
        alike = list(equal)
        yield from (alike[first : first + batch_size] for first in range(0, len(alike), batch_size))


@torch.no_grad()
def predicts_blindly(model: Callable[..., Any], ids: torch.Tensor) -> bool:
    """Whether the model is causal: changing a token does not change the logits before it.

    An encoder sees the tokens that it would have to predict, so its score would be meaningless. A model without
    `.logits` for every token counts as not causal. `ids` are at least two tokens, `(count,)`.
    """
    row = ids[None, :16]
    other = row.clone()
    other[0, -1] = row[0, 0] if row[0, 0] != row[0, -1] else (row[0, 0] == 0).long()
    both = torch.cat([row, other])
    logits = getattr(model(input_ids=both), "logits", torch.empty(0))
    if logits.shape[:2] != both.shape:
        return False
    before, after = logits[:, :-1].float()
    # Equal up to rounding, since a device may sum in another order. Inputs that are rounded to 8 bits amplify that.
    is_quantized = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    tolerance = 0.25 if is_quantized else 1e-3
    return not (before - after).abs().max() > tolerance * before.abs().max()


@torch.no_grad()
def score(model: Callable[..., Any], ids: torch.Tensor, windowing: Windowing, *, batch_size: int) -> Score:
    """Scores a text, given as token ids `(count,)` on the model's device, with `batch_size` windows per forward pass.

    The model takes `input_ids` (batch, window) and `use_cache`, and returns an object with `.logits` (batch, window,
    vocabulary).
    """
    total, predicted, seen, seconds = 0.0, 0, 0, 0.0
    front = [] if windowing.bos is None else [windowing.bos]
    lead = ids.new_tensor(front, dtype=torch.long)
    for part in batches(spans(len(ids), windowing), batch_size):
        rows = torch.stack([torch.cat([lead, ids[span.start : span.stop]]) for span in part])
        start = time.perf_counter()
        logits = model(input_ids=rows, use_cache=False).logits
        # Row by row: the logits in float32 are the largest tensor of the whole pass.
        for span, row, scores in zip(part, rows, logits, strict=True):
            first = span.scored - span.start + len(front)
            total += float(F.cross_entropy(scores[first - 1 : -1].float(), row[first:], reduction="sum"))
        seconds += time.perf_counter() - start
        predicted, seen = predicted + sum(span.stop - span.scored for span in part), seen + rows.numel()
    return Score(loss=total / predicted, tokens=predicted, seen=seen, seconds=seconds)
