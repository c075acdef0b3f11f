"""Detection of steps that must not be applied: values that are not finite, and spikes.

A step reads one global batch. A step that is not applied still counts, so the data of a run do not depend on which
steps were skipped. The schedules do not advance: the learning rate and the gates' targets depend on the number of
updates, which only applied steps increase.
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
    """Too many steps in a row could not be applied, so the run ends; none of them changed anything."""

    def __init__(self, step: int, problem: str, in_a_row: int, checkpoint: Path | None):
        self.step = step
        rows = f", the last of {in_a_row} steps in a row that were not applied" if in_a_row > 1 else ""
        super().__init__(
            f"step {step}: {problem}{rows}\n"
            f"  last good checkpoint: {checkpoint or 'none yet'}\n"
            "  remedy: lower the learning rate, or inspect the batches named above; to skip more of them, raise "
            "training.max_bad_steps; then start again"
        )


class Guard:
    """Counts consecutive steps that were not applied, and detects spikes; resumes from `state`, its `state_dict`."""

    def __init__(self, training: TrainingConfig, state: Mapping[str, Any]):
        self._training = training
        self._in_a_row: int = state.get("in_a_row", 0)
        self._recent: deque[float] = deque(state.get("recent", ()), maxlen=training.spike_window)

    def limits(self) -> Limits:
        """The limits of the next step's loss and gradient norm."""
        bound = self._spike() if self._training.spike in ("skip", "stop") else math.inf
        return Limits(loss=bound) if self._training.spike_measure == "loss" else Limits(norm=bound)

    def _spike(self) -> float:
        if self._training.spike == "off" or len(self._recent) < self._training.spike_window:
            return math.inf
        return self._training.spike_factor * statistics.median(self._recent)

    def after(self, result: StepResult, norm: float | None) -> tuple[str | None, bool]:
        """Records a step and its gradient's norm; returns a message, if any, and whether the run must end."""
        training = self._training
        if result.problem:
            self._in_a_row += 1
            stops = result.spike and training.spike == "stop"
            return result.problem, stops or self._in_a_row >= training.max_bad_steps
        if not result.applied:  # fp16 is still adjusting its loss scale
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
        return BadSteps(step, problem, self._in_a_row, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """A few numbers for JSON, the same on every rank."""
        return {"in_a_row": self._in_a_row, "recent": list(self._recent)}
