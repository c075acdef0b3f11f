"""Where a training step waits for the device: counted on the CPU, by the calls that would wait on an accelerator."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from cook.base.batches import Batch, on_device
from cook.base.signals import Request
from cook.families.cpm_ant import ADAPTER
from cook.pruning.gates import Gates
from cook.training.step import ExtraLoss, train_step
from tests.absent_device import AbsentDevice
from tests.training import tiny_training as tiny

COOK = str(Path(__file__).parents[2] / "cook")
WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")
ON_CPU = ("pruning/gates.py", "pruning/controller.py", "pruning/relaxation.py", "families/head_dims.py")
"""These read only tensors that are on the CPU anyway."""


class PlainEngine:
    """A model and SGD with the calls that a step needs of an engine."""

    device, accumulation, loss_scale, can_rescale = torch.device("cpu"), 2, 1.0, False

    def __init__(self) -> None:
        self.module = tiny.build()
        self.module.load_state_dict(tiny.weights())
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.0)

    def moved(self, batch: Batch) -> Batch:
        return on_device(ADAPTER.on_host(batch), self.device)

    def __call__(self, **inputs: torch.Tensor) -> object:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, _limit: float = 0.0) -> bool:
        self.optimizer.step()
        return True

    def set_learning_rate(self, rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = rate

    def gradient_norm(self) -> float:
        return 0.0


@pytest.fixture
def waits(monkeypatch) -> Counter[str]:
    """Counts, by file of this package, calls that wait for a tensor's value."""
    found: Counter[str] = Counter()

    def counted(name):
        original = getattr(torch.Tensor, name)

        def call(tensor, *args, **options):
            caller = sys._getframe(1).f_code.co_filename
            if caller.startswith(COOK) and not caller.endswith(ON_CPU):
                found[caller.removeprefix(COOK + "/")] += 1
            return original(tensor, *args, **options)

        return call

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    return found


def step_once(
    engine: PlainEngine, gated: bool, gates: Gates | None = None, extra_loss: ExtraLoss | None = None
) -> None:
    gates = gates or (tiny.make_gates() if gated else None)
    attached = tiny.attach(engine.module, set(gates.sizes) if gates else set(), {})
    result = train_step(
        engine,
        tiny.Batches().micro_batches(0, 0, 1, tiny.ROWS // engine.accumulation),
        1,
        num_targets=tiny.Batches().num_targets(0),
        learning_rate=0.1,
        attached=attached,
        gates=gates,
        extra_loss=extra_loss,
        asked=Request.NOTHING,
    )
    assert result.applied and result.problem is None


@pytest.mark.parametrize("gated", [False, True])
def test_a_step_itself_waits_for_the_device_once(waits, gated):
    engine = PlainEngine()
    waits.clear()
    step_once(engine, gated)
    assert waits == {
        "base/distributed.py": 1,
        "training/step.py": 3 + gated,  # of sums that are on the CPU by then
        "models/cpm_ant.py": 6 * engine.accumulation,  # of the batch before it is moved; four only on a CPU
    }


@pytest.mark.parametrize("gated", [False, True])
def test_a_device_is_waited_for_once_per_step(monkeypatch, gated):
    """The same step on a device without values: the only question is for the sums that the log needs."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: False)  # torch knows no autocast for it
    monkeypatch.setattr(torch, "autocast", lambda *kind, **options: contextlib.nullcontext())
    engine = PlainEngine()
    engine.device = torch.device("meta")
    engine.module.to("meta")
    engine.optimizer = torch.optim.SGD(engine.module.parameters(), lr=0.0)
    with AbsentDevice() as device:
        step_once(engine, gated)
    assert device.waits == ["aten._to_copy.default"]


def test_the_teacher_computes_before_the_gates_are_waited_for(monkeypatch):
    gates, calls = tiny.make_gates(), []

    class Teacher:
        def prepare(self, _batch: Batch) -> None:
            calls.append("teacher")

        def __call__(self, _batch: Batch, logits: torch.Tensor) -> torch.Tensor:
            calls.append("loss")
            return logits.new_zeros(())

    draw = gates.draw
    monkeypatch.setattr(gates, "draw", lambda step: calls.append("draw") or draw(step))
    step_once(PlainEngine(), True, gates, Teacher())
    assert calls == ["teacher", "draw", "loss", "teacher", "loss"]


def test_a_wait_is_counted(waits):
    names: dict[str, object] = {}
    exec(compile("def wait(x): return x.item(), x.cpu(), bool(x)", f"{COOK}/training/other.py", "exec"), names)
    names["wait"](torch.ones(()))
    assert waits == {"training/other.py": 3}
