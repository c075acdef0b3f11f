"""Forward speed of a model, for comparisons within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch

from cook.data.losses import model_inputs

LARGEST_TIMED = 2_000_000_000
"""Parameters beyond which whole models are not built just to be timed."""


@torch.no_grad()
def forward_seconds(
    models: Mapping[str, torch.nn.Module],
    batches: Sequence[dict[str, torch.Tensor]],
    device: torch.device,
    *,
    repeats: int = 5,
) -> dict[str, float]:
    """Median seconds of one pass over `batches` for each model.

    The models take turns, so that a machine whose speed drifts treats them alike; one warm-up round is not counted.
    """
    inputs = [{key: value.to(device) for key, value in model_inputs(batch).items()} for batch in batches]
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(repeats + 1):
        for name, model in models.items():
            _wait(device)
            start = time.perf_counter()
            for batch in inputs:
                model(**batch)
            _wait(device)
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
