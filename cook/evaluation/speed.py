"""Forward speed of a model, for comparisons within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

LARGEST_TIMED = 2_000_000_000
"""Parameters beyond which whole models are not built just to be timed."""


def median_seconds(
    actions: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int = 5
) -> dict[str, float]:
    """Median seconds of each action.

    They take turns, so that a machine whose speed drifts treats them alike; one warm-up round is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(repeats + 1):
        for name, action in actions.items():
            _wait(device)
            start = time.perf_counter()
            action()
            _wait(device)
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def forward_seconds(
    models: Mapping[str, torch.nn.Module],
    batches: Sequence[dict[str, torch.Tensor]],
    device: torch.device,
    *,
    repeats: int = 5,
) -> dict[str, float]:
    """Median seconds of one pass over `batches` for each model."""
    inputs = [{k: v.to(device) for k, v in batch.items() if k != "targets"} for batch in batches]

    def one_pass(model: torch.nn.Module) -> None:
        for batch in inputs:
            model(**batch)

    return median_seconds({n: partial(one_pass, m) for n, m in models.items()}, device, repeats=repeats)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
