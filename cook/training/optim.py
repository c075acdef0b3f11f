"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from cook.config.types import TrainingConfig


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The weights' learning rate at step `step`, counted from 1: linear warmup, then the chosen decay."""
    if not training.train_weights:
        return 0.0
    warmup = round(training.warmup * training.steps)
    if step <= warmup:
        return training.learning_rate * step / warmup
    done = (step - warmup) / max(1, training.steps - warmup)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[training.schedule]
    if training.schedule == "constant":
        return training.learning_rate
    low = training.min_learning_rate
    return training.learning_rate * (low + (1.0 - low) * shape)
