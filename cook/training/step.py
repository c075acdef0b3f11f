"""One training step, and the guard against steps that must not be applied: values that are not finite, and spikes.

A step reads one global batch. A step that is not applied still counts, so the data of a run do not depend on which
steps were skipped. The schedules do not advance: the learning rate and the gates' targets depend on the number of
updates, which only applied steps increase.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from cook.base import distributed
from cook.base.batches import Batch
from cook.base.errors import RunFailed
from cook.base.faults import point
from cook.base.signals import Request
from cook.config.types import TrainingConfig
from cook.data.token_loss import model_inputs
from cook.distill.teacher_loss import Projections
from cook.pruning.attach import AttachedGates
from cook.pruning.gates import Gates, own_share
from cook.training.engine import Engine
from cook.training.optim import TaskLoss, token_loss


class ExtraLoss(Protocol):
    """A loss that is added to the task's."""

    def prepare(self, batch: Batch) -> None:
        """Computes the teacher's logits. Without it, the next call does."""

    def __call__(self, batch: Batch, student_logits: torch.Tensor, /) -> torch.Tensor:
        """The loss summed over the batch's targets."""


class Limits(NamedTuple):
    """A step above these limits is not applied."""

    loss: float = math.inf  # mean cross entropy of the global batch, in nats per token
    norm: float = math.inf  # global norm of the gradient, before clipping


NO_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of a step, the same on every rank."""

    loss: float  # mean task loss per target of the global batch (nats per token); NaN if not finite on some rank
    applied: bool  # False if nothing was updated: no weights, gates or moments
    problem: str | None = None  # why the step was not applied; None also while fp16 still adjusts its loss scale
    spike: bool = False  # whether the problem is a limit
    asked: Request  # the requests of signals on any rank


def train_step(
    engine: Engine,
    micro_batches: Sequence[Batch],
    step: int,
    *,
    num_targets: int,
    learning_rate: float,
    attached: AttachedGates | None,
    gates: Gates | None,
    task_loss: TaskLoss = token_loss,
    extra_loss: ExtraLoss | None,
    projections: Projections | None = None,
    asked: Request,
    update: int | None = None,
    limits: Limits = NO_LIMITS,
) -> StepResult:
    """Runs forward, backward and the update of weights and gates; a step is updated on all ranks or on none.

    If the loss or a gradient is not finite on any rank, or above `limits`, only the random generators change: weights,
    their moments, the engine's schedule, gates, their moments and multipliers keep their values.

    The loss is summed over targets and divided by the global batch's number of targets, so that any split into ranks
    and micro-batches gives the same gradient.

    Args:
        engine: The model.
        micro_batches: This rank's share of the global batch.
        step: The batch's number, counted from 1; the gates' noise depends on it.
        num_targets: Targets (tokens, or rows of a classification) of the global batch, over all ranks.
        learning_rate: The learning rate of the weights.
        attached: The gates' hooks, already set to the fixed masks; None without gates.
        gates: The masks being learned; None in pretraining and finetuning.
        task_loss: The task's loss.
        extra_loss: Distillation, added to the task's loss.
        projections: The projections that `extra_loss` learns.
        asked: The requests of signals on this rank.
        update: The update's number, counted from 1; the gates' targets depend on it. None: the same as `step`.
        limits: The limits of the loss and the gradient's norm.
    """
    z: torch.Tensor | None = None
    # The engine divides by the number of micro-batches and averages over ranks; undone here, to divide by targets.
    share = engine.accumulation * distributed.world_size() / num_targets
    loss_sum = torch.zeros((), device=engine.device)
    bad = torch.zeros((), dtype=torch.bool, device=engine.device)
    for number, batch in enumerate(map(engine.moved, micro_batches), start=1):
        _prepare(extra_loss, batch, gates)
        if gates:
            assert attached is not None, "learned gates need their hooks"
            z = gates.draw(step).to(engine.device).requires_grad_() if z is None else z
            attached.set(gates.split(z))
        own_loss, loss = _losses(engine, batch, task_loss, extra_loss)
        point("memory.step")
        engine.backward(loss * share)
        loss_sum += own_loss.detach()
        bad |= ~torch.isfinite(loss.detach())
        if number < len(micro_batches):
            engine.step()

    map_gradient = projections.gradient() if projections else None
    if map_gradient is not None:  # as for the gates, outside the engine: unscaled and averaged over the ranks
        map_gradient = distributed.all_reduce_sum(map_gradient / (engine.loss_scale * distributed.world_size()))
    requested = loss_sum.new_tensor([float(request in asked) for request in Request])
    parts = [loss_sum.nan_to_num(), bad, requested]
    if z is not None:
        parts.append(own_share(z, engine.loss_scale))
    # On an accelerator this is the only place where the step itself waits for the device.
    total, bad_ranks, votes, *gradients = distributed.summed_on_cpu(*parts)
    loss_total, num_bad, z_gradient = float(total), int(bad_ranks), gradients[0] if gradients else None
    point("step.backward")
    loss_mean = math.nan if num_bad else loss_total / num_targets
    problem = _problem(num_bad, bad, z_gradient, map_gradient)
    if spike := problem is None and loss_mean > limits.loss:
        problem = f"the loss {loss_mean:.4g} is above {limits.loss:.4g}"
    engine.set_learning_rate(learning_rate)
    # fp16 finds its loss scale by occasional overflows: no problem as long as the scale can still decrease.
    seeks_scale = engine.can_rescale and not num_bad and not spike
    applied = engine.step(limits.norm if problem is None else -1.0)
    point("step.weights")
    if applied and gates:
        assert z_gradient is not None
        gates.update(z_gradient, step if update is None else update)
    if applied and projections and map_gradient is not None:
        projections.update(map_gradient)
    norm = engine.gradient_norm()
    if not applied and problem is None and norm is not None and math.isfinite(norm):
        problem, spike = f"the gradient's norm {norm:.4g} is above {limits.norm:.4g}", True
    elif not applied:
        problem = None if seeks_scale else problem or "the gradient of the weights is not finite"
    requests = Request(sum(request for request, count in zip(Request, votes.tolist(), strict=True) if count))
    point("step.end")
    return StepResult(loss=loss_mean, applied=applied, problem=problem, spike=spike, asked=requests)


def _problem(
    num_bad: int, bad: torch.Tensor, z_gradient: torch.Tensor | None, map_gradient: torch.Tensor | None
) -> str | None:
    """Values that are not finite, before the gradient's norm is known; the same message on every rank."""
    if num_bad:
        ranks = [str(rank) for rank, is_bad in enumerate(distributed.gather(bool(bad))) if is_bad]
        return f"the loss on rank {', '.join(ranks)} is not finite"
    if z_gradient is not None and not torch.isfinite(z_gradient).all():
        return "the gradient of a gate is not finite"
    if map_gradient is not None and not torch.isfinite(map_gradient).all():
        return "the gradient of a projection is not finite"
    return None


def try_step(
    engine: Engine,
    batch: Batch,
    *,
    attached: AttachedGates | None,
    gates: Gates | None,
    extra_loss: ExtraLoss | None,
) -> None:
    """Runs the passes of a step on one micro-batch, which change nothing; see `Engine.attempt`."""
    batch = engine.moved(batch)
    _prepare(extra_loss, batch, gates)
    z = gates.draw(1).to(engine.device).requires_grad_() if gates else None
    if gates and z is not None and attached is not None:
        attached.set(gates.split(z))
    leaves = [] if z is None else [z]
    engine.attempt(lambda forward: _losses(forward, batch, token_loss, extra_loss)[1], leaves)


def _prepare(extra_loss: ExtraLoss | None, batch: Batch, gates: Gates | None) -> None:
    """Runs the teacher before the gates are drawn: while it computes on an accelerator, they may still move.

    The teacher of several sizes is the largest one, whose gates must be drawn first.
    """
    if extra_loss is not None and not (gates and gates.smaller):
        extra_loss.prepare(batch)


def _losses(
    forward: Callable[..., Any], batch: Batch, task_loss: TaskLoss, extra_loss: ExtraLoss | None
) -> tuple[torch.Tensor, torch.Tensor]:
    # A function of its own: the model's output is freed before the backward pass.
    output = forward(**model_inputs(batch))
    loss = task_loss(output, batch)
    return loss, loss if extra_loss is None else loss + extra_loss(batch, output.logits)


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
