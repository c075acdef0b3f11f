"""Watches over steps that must not be applied: values that are not finite, and spikes.

A step is a global batch. One that is not applied is over all the same: its batch has been read and the next step reads
the next one, so the data of a run do not depend on what was skipped. The schedules stand still: the learning rate and
the gates' targets go by the number of updates, which only an applied step moves.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cook.base.errors import RunFailed
from cook.config.types import TrainingConfig
from cook.training.step import Limits, StepResult


class BadSteps(RunFailed):
    """So many steps in a row could not be applied that the run ends; nothing of them was."""

    def __init__(self, step: int, problem: str, in_a_row: int, checkpoint: Path | None):
        self.step = step
        rows = f", the last of {in_a_row} steps in a row that were not applied" if in_a_row > 1 else ""
        super().__init__(
            f"step {step}: {problem}{rows}\n"
            f"  last good checkpoint: {checkpoint or 'none yet'}\n"
            "  remedy: lower the learning rate, or look at the batches named above; to skip more of them raise "
            "training.max_bad_steps; then start again"
        )


class Guard:
    """Counts the steps in a row that were not applied, and knows what a spike is.

    Args:
        training: The stage's training section.
        state: What `state_dict` gave, of a run that is gone on with.
    """

    def __init__(self, training: TrainingConfig, state: Mapping[str, Any]):
        self._training = training
        self._in_a_row: int = state.get("in_a_row", 0)
        self._recent: deque[float] = deque(state.get("recent", ()), maxlen=training.spike_window)

    def limits(self) -> Limits:
        """What the next step may show at most."""
        bound = self._spike() if self._training.spike in ("skip", "stop") else math.inf
        return Limits(loss=bound) if self._training.spike_measure == "loss" else Limits(norm=bound)

    def _spike(self) -> float:
        if self._training.spike == "off" or len(self._recent) < self._training.spike_window:
            return math.inf
        return self._training.spike_factor * statistics.median(self._recent)

    def after(self, result: StepResult, norm: float | None) -> tuple[str | None, bool]:
        """Takes note of a step and the norm of its gradient.

        Returns: what to say about it, if anything, and whether the run must end.
        """
        training = self._training
        if result.problem:
            self._in_a_row += 1
            stops = result.spike and training.spike == "stop"
            return result.problem, stops or self._in_a_row >= training.max_bad_steps
        if not result.applied:  # fp16 seeks its loss scale
            return None, False
        self._in_a_row = 0
        if training.spike == "off":
            return None, False
        value = result.loss if training.spike_measure == "loss" else norm
        bound = self._spike()
        if value is not None:
            self._recent.append(value)
        if value is None or value <= bound:
            return None, False
        what = "loss" if training.spike_measure == "loss" else "gradient's norm"
        return f"the {what} {value:.4g} is above {bound:.4g}; it was applied", False

    def failure(self, step: int, problem: str, checkpoint: Path | None) -> BadSteps:
        """The error that ends the run."""
        return BadSteps(step, problem, self._in_a_row, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """A few JSON numbers, the same on every rank."""
        return {"in_a_row": self._in_a_row, "recent": list(self._recent)}
