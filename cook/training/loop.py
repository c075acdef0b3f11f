"""The training loop: every stage, masks or none, goes through this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cook.base import distributed
from cook.base.batches import Batch
from cook.base.errors import Interrupted
from cook.base.signals import StopSignals
from cook.config.types import TrainingConfig
from cook.masks.gates import Gates
from cook.report.console import Progress
from cook.report.events import EventLog
from cook.surgery.gates import AttachedGates
from cook.training.checkpoint import Position, save_checkpoint
from cook.training.engine import Engine
from cook.training.optim import learning_rate
from cook.training.step import ExtraLoss, StepResult, train_step


class Batches(Protocol):
    """What the loop needs of a data loader: the batch of any step, without a state."""

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> Sequence[Batch]: ...

    def num_targets(self, step: int) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a stage's loop works with."""

    name: str
    engine: Engine
    batches: Batches
    training: TrainingConfig
    attached: AttachedGates
    gates: Gates | None
    extra_loss: ExtraLoss | None
    checkpoints: Path
    fingerprint: str
    on_save: Callable[[], None]
    """Called after each checkpoint, on every rank: writes the masks as they stand."""


def train(run: Run, start: Position, log: EventLog) -> Position:
    """Trains from `start` to the stage's last step.

    Raises:
        Interrupted: after a signal, once a checkpoint is written.
        NonFinite: the loss or a gradient is not finite; nothing of that step was applied.
    """
    training, position = run.training, start
    final_target = max((c.target for c in run.gates.constraints), default=None) if run.gates else None
    rank, world = distributed.rank(), distributed.world_size()
    meter = _Meter(start.tokens)
    with (
        StopSignals() as signals,
        Progress(run.name, training.steps, start.step, enabled=rank == 0, final_target=final_target) as progress,
    ):
        for step in range(start.step + 1, training.steps + 1):
            num_targets = run.batches.num_targets(step - 1)
            rate = learning_rate(training, step)
            result = train_step(
                run.engine,
                run.batches.micro_batches(step - 1, rank, world, training.rows_at_once(world)),
                step,
                num_targets=num_targets,
                learning_rate=rate,
                attached=run.attached,
                gates=run.gates,
                extra_loss=run.extra_loss,
                stop_asked=signals.asked,
            )
            position = Position(step=step, tokens=position.tokens + num_targets)
            _report(run, position, result, meter, log, progress)
            # What came during the last step itself has not been heard by it, and the stage after must not begin.
            stop = _any_rank(signals.asked) if step == training.steps else result.stop
            if stop or step == training.steps or (training.save_every and step % training.save_every == 0):
                save_checkpoint(
                    run.checkpoints, run.engine, run.gates, position,
                    fingerprint=run.fingerprint, keep=training.keep_checkpoints,
                )  # fmt: skip
                run.on_save()
            if stop:
                raise Interrupted(f"{run.name} saved step {step} of {training.steps}; the same command goes on from it")
    return position


def _any_rank(flag: bool) -> bool:
    return any(distributed.gather(flag))


class _Meter:
    """Tokens a second since the last reading."""

    def __init__(self, tokens: int):
        self._tokens, self._time = tokens, time.perf_counter()
        self.rate: float | None = None

    def read(self, tokens: int) -> float:
        now = time.perf_counter()
        self.rate = (tokens - self._tokens) / max(1e-9, now - self._time)
        self._tokens, self._time = tokens, now
        return self.rate


def _report(
    run: Run, position: Position, result: StepResult, meter: _Meter, log: EventLog, progress: Progress
) -> None:
    step = position.step
    due = step % run.training.log_every == 0 or step in (1, run.training.steps)
    if due:
        meter.read(position.tokens)
    expected = target = None
    record: dict[str, object] = {
        "step": step,
        "loss": result.loss,
        "learning_rate": run.engine.learning_rate(),
        "tokens": position.tokens,
        "tokens_per_second": meter.rate,
        "grad_norm": run.engine.gradient_norm(),
        "applied": result.applied,
    }
    if run.gates:
        names = [c.name for c in run.gates.constraints]
        sparsity, wanted = run.gates.expected_sparsity(), run.gates.targets(step)
        expected, target = float(sparsity.mean()), float(wanted.mean())
        record["expected_sparsity"] = dict(zip(names, sparsity.tolist(), strict=True))
        record["target_sparsity"] = dict(zip(names, wanted.tolist(), strict=True))
        record["lambda"] = dict(zip(names, run.gates.controller.multipliers.tolist(), strict=True))
    progress.update(
        step, loss=result.loss, tokens_per_second=meter.rate, expected=expected, target=target
    )
    if due:
        log.write(record)

