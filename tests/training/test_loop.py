"""When the loop saves, logs and stops: around a step that does nothing."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cook.base.errors import Interrupted
from cook.base.signals import Request
from cook.config.types import TrainingConfig
from cook.report.events import EventLog, read_log
from cook.training import loop
from cook.training.checkpoint import Position
from cook.training.step import NonFinite, StepResult


class Engine:
    def learning_rate(self) -> float:
        return 0.5

    def gradient_norm(self) -> float | None:
        return None


class Batches:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> list:
        self.asked.append(step)
        return []

    def num_targets(self, step: int) -> int:
        return 10 + step


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the loop; `at` maps a step to what happens in it. Gives the end and the batches; `saved` are the saves."""
    saved: list[Any] = []

    def go(*, start: int = 0, at: dict[int, Any] | None = None, **changes: Any):
        batches, what = Batches(), at or {}
        training = TrainingConfig(steps=9, train_batch_size=1, micro_batch_size=1, learning_rate=1.0, log_every=4)

        def step(_engine: Any, _batches: Any, number: int, *, asked: Request, **_: Any) -> StepResult:
            if number in what:
                what[number]()
            return StepResult(loss=float(number), applied=True, asked=asked)

        monkeypatch.setattr(loop, "train_step", step)
        monkeypatch.setattr(loop, "save_checkpoint", lambda root, e, g, position, **_: saved.append(position))
        with EventLog(tmp_path, tensorboard=False) as log:
            work = loop.Run(
                name="x", engine=Engine(), batches=batches, training=dataclasses.replace(training, **changes),
                attached=None, gates=None, extra_loss=None, checkpoints=tmp_path, fingerprint="",
                on_save=lambda: saved.append("masks"),
            )  # fmt: skip
            end = loop.train(work, Position(step=start, tokens=100 * start), log)
        return end, batches

    go.saved = saved
    return go


def steps_saved(saved: list[Any]) -> list[int]:
    assert saved[1::2] == ["masks"] * (len(saved) // 2), "masks are written with every checkpoint"
    return [position.step for position in saved[::2]]


@pytest.mark.parametrize(("every", "expected"), [(0, [9]), (3, [3, 6, 9]), (4, [4, 8, 9]), (20, [9])])
def test_it_saves_when_asked_and_at_the_end(run, every, expected):
    end, _ = run(save_every=every)
    assert steps_saved(run.saved) == expected and end.step == 9


def test_it_counts_tokens_and_logs_the_first_the_last_and_every_nth_step(run, tmp_path):
    end, batches = run()
    assert end.tokens == sum(10 + step for step in range(9)) and batches.asked == list(range(9))
    records = read_log(tmp_path / "log.jsonl")
    assert [(r["step"], r["loss"], r["learning_rate"]) for r in records] == [(s, float(s), 0.5) for s in (1, 4, 8, 9)]
    assert records[1]["tokens"] == 10 + 11 + 12 + 13


def test_it_goes_on_behind_the_checkpoint(run):
    end, batches = run(start=7)
    assert batches.asked == [7, 8] and end == Position(step=9, tokens=700 + 17 + 18)


def test_a_finished_stage_is_not_trained_again(run):
    end, batches = run(start=9)
    assert batches.asked == [] and run.saved == [] and end.step == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_by_the_next_step(run, number):
    with pytest.raises(Interrupted, match="saved step 4 of 9"):
        run(at={3: lambda: os.kill(os.getpid(), number)})
    assert steps_saved(run.saved) == [4]


@pytest.mark.parametrize("step", [8, 9])
def test_a_signal_at_the_very_end_stops_too_lest_the_next_stage_begin(run, step):
    with pytest.raises(Interrupted, match="saved step 9 of 9"):
        run(at={step: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert steps_saved(run.saved) == [9]


@pytest.mark.parametrize(("step", "saves"), [(3, [4, 9]), (8, [9]), (9, [9])])
def test_sigusr1_saves_once_and_goes_on(run, step, saves):
    end, _ = run(at={step: lambda: os.kill(os.getpid(), signal.SIGUSR1)})
    assert steps_saved(run.saved) == saves and end.step == 9


def test_a_stop_after_a_save_and_a_second_stop_are_one_stop(run):
    def thrice() -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="saved step 4 of 9"):
        run(at={3: thrice})
    assert steps_saved(run.saved) == [4]


def test_afterwards_signals_act_as_before(run):
    before = signal.getsignal(signal.SIGUSR1)
    run()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_nothing_is_saved_of_a_step_that_is_not_finite(run):
    def explode() -> None:
        raise NonFinite(6, "the loss on rank 1")

    with pytest.raises(NonFinite, match="step 6: the loss on rank 1 is not finite"):
        run(at={6: explode}, save_every=3)
    assert steps_saved(run.saved) == [3]
