"""When the loop saves, logs and stops: around a step that does nothing."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cook.base.errors import Interrupted, RunFailed
from cook.base.signals import Request
from cook.config.types import TrainingConfig
from cook.report.events import EventLog, read_log
from cook.training import loop
from cook.training.checkpoint import Position
from cook.training.step import BadSteps, StepResult


class Engine:
    def learning_rate(self) -> float:
        return 0.5

    def gradient_norm(self) -> float | None:
        return None


class Saver:
    """Publishes at once, unless `breaks` names the step whose checkpoint fails behind the training's back."""

    breaks = 0

    def __init__(self, saved: list[Any]):
        self.saved, self.failed, self.newest = saved, False, None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def save(self, _engine: Any, _gates: Any, position: Position, *, also: Any, projections: Any) -> None:
        self.saved.append(position)
        also()
        self.newest, self.failed = Path(f"step-{position.step}"), position.step == self.breaks

    def wait(self) -> None:
        if self.failed:
            raise RunFailed("no space left")


class Batches:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def sample_ids(self, step: int, rank: int = 0, world_size: int = 1) -> list[str]:
        return [f"train:{100 + step + rank}"]

    def state_dict(self) -> dict:
        return {"read": len(self.asked)}

    def load_state_dict(self, state: dict) -> None:
        self.given = state

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> list:
        self.asked.append(step)
        return []

    def num_targets(self, step: int) -> int:
        return 10 + step


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the loop; `at` maps a step to what happens in it. Gives the end and the batches; `saved` are the saves."""
    saved: list[Any] = []

    def go(*, start: int = 0, at: dict[int, Any] | None = None, state: Any = None, **changes: Any):
        batches, what = Batches(), at or {}
        training = TrainingConfig(steps=9, train_batch_size=1, micro_batch_size=1, learning_rate=1.0, log_every=4)

        def step(_engine: Any, _batches: Any, number: int, *, asked: Request, **told: Any) -> StepResult:
            run_under.append((number, told["update"], told["learning_rate"], told["limits"]))
            result = StepResult(loss=float(number), applied=True, asked=asked)
            return dataclasses.replace(result, **(what[number]() or {} if number in what else {}))

        monkeypatch.setattr(loop, "train_step", step)
        monkeypatch.setattr(loop, "Saver", lambda *_, **__: Saver(saved))
        with EventLog(tmp_path, tensorboard=False) as log:
            work = loop.Run(
                name="x",
                engine=Engine(),
                batches=batches,
                training=dataclasses.replace(training, **changes),
                attached=None,
                gates=None,
                extra_loss=None,
                checkpoints=tmp_path,
                fingerprint="",
                on_save=lambda: saved.append("masks"),
            )
            end = loop.train(work, Position(step=start, updates=start, tokens=100 * start, **(state or {})), log)
        return end, batches

    run_under: list[Any] = []
    go.saved, go.run_under = saved, run_under
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


def test_it_resumes_after_the_checkpoint(run):
    end, batches = run(start=7)
    assert batches.asked == [7, 8] and end == Position(step=9, updates=9, tokens=700 + 17 + 18)


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
def test_sigusr1_saves_once_and_continues(run, step, saves):
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


def bad(problem: str = "the loss on rank 1 is not finite", **others: Any):
    return lambda: {"applied": False, "problem": problem, "loss": math.nan, **others}


def test_a_bad_step_is_named_and_left_out_and_the_schedules_wait_for_the_next(run, tmp_path, capsys):
    end, batches = run(at={3: bad(), 4: bad(), 6: bad()}, warmup=0.0, schedule="linear", min_learning_rate=0.0)
    assert end == Position(step=9, updates=6, tokens=sum(10 + step for step in range(9)))
    assert batches.asked == list(range(9)), "the data continue"
    assert [update for _, update, *_ in run.run_under] == [1, 2, 3, 3, 3, 4, 4, 5, 6]
    rates = [loop.learning_rate(TRAINING_OF_9, update) for _, update, *_ in run.run_under]
    assert [rate for *_, rate, _ in run.run_under] == rates
    records = {record["step"]: record for record in read_log(tmp_path / "log.jsonl")}
    assert sorted(records) == [1, 3, 4, 6, 8, 9]
    assert records[3]["problem"] == "the loss on rank 1 is not finite" and records[3]["samples"] == {"0": ["train:102"]}
    assert records[3]["loss"] is None and not records[3]["applied"] and "problem" not in records[8]
    assert "x step 4: the loss on rank 1 is not finite; samples read by rank 0: train:103" in capsys.readouterr().err


TRAINING_OF_9 = TrainingConfig(
    steps=9,
    train_batch_size=1,
    micro_batch_size=1,
    learning_rate=1.0,
    warmup=0.0,
    schedule="linear",
    min_learning_rate=0.0,
)


def test_too_many_bad_steps_in_a_row_end_the_run_and_name_the_last_checkpoint(run):
    with pytest.raises(BadSteps, match="step 7: .* not finite, the last of 3 steps in a row") as caught:
        run(at={step: bad() for step in (1, 2, 5, 6, 7)}, save_every=2)
    assert "last good checkpoint: step-6" in str(caught.value) and "training.max_bad_steps" in str(caught.value)
    assert [p.updates for p in run.saved[::2]] == [0, 2, 2] and run.saved[4].guard == {"in_a_row": 2, "recent": []}


def test_the_count_continues_after_a_checkpoint(run):
    with pytest.raises(BadSteps, match="step 7: the loss") as caught:
        run(start=6, at={7: bad()}, state={"guard": {"in_a_row": 2, "recent": []}})
    assert f"{os.sep}step-6" in str(caught.value), "the one it came from"
    with pytest.raises(BadSteps, match="last good checkpoint: none yet"):
        run(at={1: bad()}, max_bad_steps=1)


def test_a_save_that_fails_behind_the_training_is_heard_at_the_next_step(run, monkeypatch):
    monkeypatch.setattr(Saver, "breaks", 3)
    with pytest.raises(RunFailed, match="no space left"):
        run(save_every=3)
    assert [number for number, *_ in run.run_under] == [1, 2, 3, 4]


def test_the_loaders_state_is_saved_and_given_back(run, monkeypatch):
    given = []
    monkeypatch.setattr(Batches, "load_state_dict", lambda self, state: given.append(state))
    run(start=4, state={"data": {"read": 4}}, save_every=2)
    assert given == [{"read": 4}] and [p.data for p in run.saved[::2]] == [{"read": 2}, {"read": 4}, {"read": 5}]
