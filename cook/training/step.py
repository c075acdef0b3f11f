"""One optimisation step, in the order in which things happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cook.base import distributed
from cook.base.batches import Batch, on_device
from cook.base.errors import RunFailed
from cook.masks.gates import Gates
from cook.surgery.gates import AttachedGates
from cook.training.engine import Engine

ExtraLoss = Callable[[Batch, torch.Tensor], torch.Tensor]
"""From a batch and the student's logits to a loss summed over the batch's target tokens."""


class NonFinite(RunFailed):
    """The loss or a gradient was NaN or infinite on some rank; nothing was updated."""

    def __init__(self, step: int, what: str):
        self.step = step
        super().__init__(
            f"step {step}: {what} is not finite (NaN or infinity); nothing of this step was applied\n"
            "  remedy: start again from the last checkpoint with a lower learning rate, or look for a bad sample"
        )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    loss: float
    """Mean cross entropy a target token of the global batch, in nats."""
    applied: bool
    """False if the engine skipped the update (fp16 overflow)."""
    stop: bool
    """True if some rank was asked to stop."""


def train_step(
    engine: Engine,
    micro_batches: Sequence[Batch],
    step: int,
    *,
    num_targets: int,
    learning_rate: float,
    attached: AttachedGates,
    gates: Gates | None,
    extra_loss: ExtraLoss | None,
    stop_asked: bool,
) -> StepResult:
    """Forward, backward, update of weights and gates.

    The loss is summed over tokens and divided by the global batch's count, so that any split of the batch into ranks
    and micro-batches gives the same gradient.

    Args:
        engine: The model.
        micro_batches: This rank's share of the global batch.
        step: Counted from 1.
        num_targets: Target tokens of the global batch, over all ranks.
        learning_rate: Of the weights.
        attached: The gates' hooks, already set to the fixed masks.
        gates: The masks being learned; None in pretraining and finetuning.
        extra_loss: Distillation, added to the cross entropy.
        stop_asked: Whether this rank got a signal.

    Raises:
        NonFinite: on every rank, if the loss or a gradient is not finite on any.
    """
    z = gates.draw(step).to(engine.device).requires_grad_() if gates else None
    # The engine divides by the micro-batches and averages over the ranks; undone here in favour of the token count.
    share = engine.accumulation * distributed.world_size() / num_targets
    loss_sum = torch.zeros((), device=engine.device)
    bad = torch.zeros((), dtype=torch.bool, device=engine.device)
    for number, batch in enumerate(micro_batches, start=1):
        if gates and z is not None:
            attached.set(gates.split(z))
        cross_entropy, loss = _losses(engine, batch, extra_loss)
        engine.backward(loss * share)
        loss_sum += cross_entropy.detach()
        bad |= ~torch.isfinite(loss.detach())
        if number < len(micro_batches):
            engine.step()

    z_gradient = _averaged_gate_gradient(engine, z)
    health = torch.stack([loss_sum.nan_to_num(), bad.float(), loss_sum.new_tensor(float(stop_asked))])
    loss_total, num_bad, stops = distributed.all_reduce_sum(health).tolist()
    if num_bad:
        ranks = [str(rank) for rank, is_bad in enumerate(distributed.gather(bool(bad))) if is_bad]
        raise NonFinite(step, f"the loss on rank {', '.join(ranks)}")
    # fp16 finds its loss scale by overflowing now and then: such a step is skipped, not an error.
    gates_are_sound = z_gradient is None or bool(torch.isfinite(z_gradient).all())
    if not gates_are_sound and engine.precision != "fp16":
        raise NonFinite(step, "the gradient of a gate")

    engine.set_learning_rate(learning_rate)
    applied = engine.step()
    if not applied and engine.precision != "fp16":
        raise NonFinite(step, "the gradient of the weights")
    if gates and applied and gates_are_sound:
        assert z_gradient is not None
        gates.update(z_gradient, step)
    return StepResult(loss=loss_total / num_targets, applied=applied, stop=stops > 0)


def _losses(engine: Engine, batch: Batch, extra_loss: ExtraLoss | None) -> tuple[torch.Tensor, torch.Tensor]:
    batch = on_device(batch, engine.device)
    targets = batch.pop("targets")
    logits = engine(**batch).logits
    cross_entropy = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    if extra_loss is None:
        return cross_entropy, cross_entropy
    return cross_entropy, cross_entropy + extra_loss({**batch, "targets": targets}, logits)


def _averaged_gate_gradient(engine: Engine, z: torch.Tensor | None) -> torch.Tensor | None:
    """∂L/∂z of the global batch, the same on every rank, `[gates]` float32 on the CPU."""
    if z is None:
        return None
    assert z.grad is not None, "the loss does not depend on the gates"
    gradient = z.grad.float() / (engine.loss_scale * distributed.world_size())
    return distributed.all_reduce_sum(gradient).cpu()

