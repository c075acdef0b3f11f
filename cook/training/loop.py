"""The training loop of every stage."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cook.base import distributed
from cook.base.batches import Batch
from cook.base.errors import Interrupted
from cook.base.signals import Request, Signals
from cook.base.watchdog import At
from cook.config.types import TrainingConfig
from cook.distill.teacher_loss import Projections
from cook.pruning.attach import AttachedGates
from cook.pruning.gates import Gates
from cook.report.console import Progress
from cook.report.events import EventLog
from cook.report.gate_log import GateLog
from cook.training.checkpoint import Position, Saver
from cook.training.engine import Engine
from cook.training.manifest import folder_of
from cook.training.optim import TaskLoss, learning_rate, token_loss
from cook.training.step import ExtraLoss, Guard, StepResult, train_step


class Batches(Protocol):
    """The data loader as the loop uses it: the batch of any step, counted from 0, and a small state."""

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> Sequence[Batch]: ...

    def num_targets(self, step: int) -> int: ...

    def sample_ids(self, step: int, rank: int = 0, world_size: int = 1) -> list[str]:
        """The names of the samples that a rank reads in a step."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that was read, as JSON; the same on every rank."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a stage's loop works with."""

    name: str
    engine: Engine
    batches: Batches
    training: TrainingConfig
    attached: AttachedGates | None = None
    gates: Gates | None = None
    gate_log: GateLog | None = None
    task_loss: TaskLoss = token_loss
    extra_loss: ExtraLoss | None = None
    projections: Projections | None = None  # the projections that `extra_loss` learns
    checkpoints: Path
    saves: bool = True  # False: no checkpoints, for a short run that starts over if it is interrupted
    fingerprint: str = ""
    on_save: Callable[[], None] = lambda: None  # called after each checkpoint, on every rank; writes the current masks
    at: At = lambda _step, _phase: None  # called at the start of every step and save, for a watchdog
    unit: str = "tok"  # name of the loader's targets, for the displayed speed
    step_flops: float = 0.0  # FLOPs of the model per step, over all ranks; 0: unknown
    peak_flops: float | None = None  # FLOP/s of the cards of all ranks together; None: unknown
    before_step: Callable[[int], None] = lambda _step: None  # called before each step, on every rank
    after_step: Callable[[int], None] = lambda _step: None  # called after each step, on every rank


def train(run: Run, start: Position, log: EventLog) -> Position:
    """Trains from `start` to the stage's last step.

    Raises:
        Interrupted: after a signal, once a checkpoint is published.
        BadSteps: too many consecutive steps could not be applied.
        RunFailed: a checkpoint could not be written.
    """
    training, position = run.training, start
    final_target = max((c.target for c in run.gates.constraints), default=None) if run.gates else None
    rank, world = distributed.rank(), distributed.world_size()
    meter, guard = _Meter(start), Guard(training, start.guard)
    began = time.perf_counter() - start.seconds
    if start.data is not None:
        run.batches.load_state_dict(start.data)
    with (
        Signals() as signals,
        Progress(
            run.name, training.steps, start.step, enabled=rank == 0, final_target=final_target, unit=run.unit
        ) as progress,
        Saver(run.checkpoints, stage=run.name, fingerprint=run.fingerprint, keep=training.keep_checkpoints) as saver,
    ):
        for step in range(start.step + 1, training.steps + 1):
            run.at(step, "step" if step > start.step + 1 else "first step")
            with meter.waiting():
                num_targets = run.batches.num_targets(step - 1)
                micro_batches = run.batches.micro_batches(step - 1, rank, world, training.rows_at_once(world))
            run.before_step(step)
            limits, update = guard.limits(), position.updates + 1
            result = train_step(
                run.engine,
                micro_batches,
                step,
                num_targets=num_targets,
                learning_rate=learning_rate(training, update),
                attached=run.attached,
                gates=run.gates,
                task_loss=run.task_loss,
                extra_loss=run.extra_loss,
                projections=run.projections,
                asked=signals.take() | (Request.SETTLE if saver.failed else Request.NOTHING),
                update=update,
                limits=limits,
            )
            note, give_up = guard.after(result, run.engine.gradient_norm())
            updates = position.updates + result.applied
            seconds, tokens = time.perf_counter() - began, position.tokens + num_targets
            position = Position(step=step, updates=updates, tokens=tokens, seconds=seconds)
            _report(run, position, result, note, meter, log, progress)
            if note and give_up:
                saver.wait()
                begun = folder_of(run.checkpoints, start.step) if start.step and run.saves else None
                raise guard.failure(step, note, saver.newest or begun)
            if Request.SETTLE in result.asked:
                saver.wait()  # raises if the save failed
            run.after_step(step)
            # The last step does not see a signal that came during it, and the next stage must not begin.
            last = distributed.gather(signals.take()) if step == training.steps else []
            asked = functools.reduce(operator.or_, last, result.asked)
            due = asked or step == training.steps or (training.save_every and step % training.save_every == 0)
            if due and run.saves:
                run.at(step, "saving")
                whole = dataclasses.replace(
                    position, guard=guard.state_dict(), data=run.batches.state_dict(), log=log.waiting
                )
                saver.save(run.engine, run.gates, whole, also=run.on_save, projections=run.projections)
            if Request.STOP in asked:
                saver.wait()
                kept = f"saved step {step} of {training.steps}" if run.saves else "saved nothing"
                then = "resume" if run.saves else "start over"
                raise Interrupted(f"{run.name} {kept}; run the same command to {then}")
        run.at(position.step, "saving")
    return position


class _Meter:
    """Tokens and steps per second since the last reading, and the share of that time spent waiting for data."""

    def __init__(self, start: Position):
        self._tokens, self._step, self._time = start.tokens, start.step, time.perf_counter()
        self._waited = 0.0
        self.rate: float | None = None
        self.steps: float | None = None
        self.wait: float | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def read(self, position: Position) -> None:
        now = time.perf_counter()
        seconds = max(1e-9, now - self._time)
        self.rate, self.wait = (position.tokens - self._tokens) / seconds, self._waited / seconds
        self.steps = (position.step - self._step) / seconds
        self._tokens, self._step, self._time, self._waited = position.tokens, position.step, now, 0.0


def _report(
    run: Run, position: Position, result: StepResult, note: str | None, meter: _Meter, log: EventLog, progress: Progress
) -> None:
    step = position.step
    due = note is not None or step % run.training.log_every == 0 or step in (1, run.training.steps)
    if due:
        meter.read(position)
    flops = run.step_flops * meter.steps if meter.steps and run.step_flops else None
    utilisation = flops / run.peak_flops if flops and run.peak_flops else None
    record: dict[str, object] = {
        "step": step,
        "loss": result.loss,
        "learning_rate": run.engine.learning_rate(),
        "tokens": position.tokens,
        "tokens_per_second": meter.rate,
        "data_wait": meter.wait,
        "grad_norm": run.engine.gradient_norm(),
        "applied": result.applied,
    }
    record |= {} if flops is None else {"flops_per_second": flops}
    record |= {} if utilisation is None else {"flops_utilisation": utilisation}
    if run.gates and due:
        names = [c.name for c in run.gates.constraints]
        numbers = {"expected_sparsity": run.gates.expected_sparsity(), "lambda": run.gates.multipliers}
        numbers["target_sparsity"] = run.gates.targets(position.updates)
        for key, values in numbers.items():
            record[key] = dict(zip(names, values.tolist(), strict=True))
    if note is not None:
        record["problem"] = note
        rank, world = distributed.rank(), distributed.world_size()
        named = distributed.gather(run.batches.sample_ids(step - 1, rank, world))
        record["samples"] = samples = {str(number): ids for number, ids in enumerate(named)}
        readers = "; ".join(f"rank {rank}: {' '.join(map(str, ids))}" for rank, ids in samples.items())
        distributed.warn(f"{run.name} step {step}: {note}; samples read by {readers}")
    loss = result.loss if math.isfinite(result.loss) else None
    sparsity = functools.partial(_mean_sparsity, run.gates, position.updates) if run.gates else None
    progress.update(step, loss=loss, tokens_per_second=meter.rate, utilisation=utilisation, sparsity=sparsity)
    if due:
        log.write(record)
    if run.gates and run.gate_log and run.gate_log.is_due(last=step == run.training.steps):
        run.gate_log.write(step, run.gates.openness())


def _mean_sparsity(gates: Gates, updates: int) -> tuple[float, float]:
    """The mean expected sparsity of the constraints, and the mean of their targets."""
    return float(gates.expected_sparsity().mean()), float(gates.targets(updates).mean())
