"""Chooses how to train: the largest micro-batch that fits on a card, and the fastest ZeRO stage and checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cook.base.batches import divisors
from cook.recipe.estimate import Card, Setup, memory_of, step_seconds
from cook.recipe.model_shape import Shape

USABLE = 0.92
"""The share of a card's memory that a plan fills. The rest is for the driver, the libraries and fragmentation."""


def largest_rows(shape: Shape, setup: Setup, card: Card, *, batch: int) -> int | None:
    """The largest micro-batch that fits on the card and divides a rank's share of the batch; None: not even one row.

    Args:
        shape: The model.
        setup: How it is trained; its rows and accumulation do not matter.
        card: What each rank runs on.
        batch: Rows per step, over all ranks.
    """
    share = max(1, batch // setup.ranks)
    for rows in reversed(divisors(share)):
        tried = _with_rows(setup, batch, rows)
        if memory_of(shape, tried, shared=card.shares_memory).peak <= USABLE * card.memory:
            return rows
    return None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A stage to be fitted on a card."""

    shape: Shape
    setup: Setup
    batch: int
    """Rows per step, over all ranks."""
    steps: int


def suggest(stages: Sequence[Planned], card: Card, *, network: float | None = None) -> Setup | None:
    """The ZeRO stage, checkpointing and micro-batch with which the stages together are fastest; None: nothing fits.

    The micro-batch is the largest that fits in all stages. Among setups whose times differ by less than 5%, it is the
    one with the lowest ZeRO stage. Optimizer states are offloaded only if nothing fits without.
    """
    first = stages[0].setup
    for offloaded in (False, True):
        best: tuple[float, Setup] | None = None
        levels = range(1 if first.half or offloaded else 0, 4)
        for zero in levels if first.ranks > 1 else levels[:1]:
            for checkpointing in (False, True):
                options: dict[str, Any] = {"zero": zero, "checkpointing": checkpointing, "offload_optimizer": offloaded}
                tried = [replace(stage, setup=replace(stage.setup, **options)) for stage in stages]
                rows = [largest_rows(one.shape, one.setup, card, batch=one.batch) or 0 for one in tried]
                if all(rows):
                    fitted = [replace(one, setup=_with_rows(one.setup, one.batch, min(rows))) for one in tried]
                    seconds = sum(s.steps * step_seconds(s.shape, s.setup, card, network=network) for s in fitted)
                    # Simpler setups come first; a gain that is smaller than the estimate's error is none.
                    if best is None or seconds < 0.95 * best[0]:
                        best = (seconds, fitted[0].setup)
        if best:
            return best[1]
    return None


def _with_rows(setup: Setup, batch: int, rows: int) -> Setup:
    """The same with micro-batches of `rows` rows, or fewer if the rank's share of the batch does not divide."""
    share = max(1, batch // setup.ranks)
    rows = max(n for n in divisors(share) if n <= rows)
    return replace(setup, rows=rows, accumulation=share // rows)
