"""What a spike is, what it leads to, and that it is watched after a resume too."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from cook.base.signals import Request
from cook.config.types import TrainingConfig
from cook.training.step import NO_LIMITS, Guard, Limits, StepResult

TRAINING = TrainingConfig(
    steps=9,
    train_batch_size=1,
    micro_batch_size=1,
    learning_rate=1.0,
    spike_window=3,
    spike_factor=2.0,
    max_bad_steps=2,
)


def applied(loss: float) -> StepResult:
    return StepResult(loss=loss, applied=True, asked=Request.NOTHING)


def skipped(*, spike: bool) -> StepResult:
    return StepResult(loss=1.0, applied=False, problem="bad", spike=spike, asked=Request.NOTHING)


def guard(losses: tuple[float, ...] = (), norms: tuple[float, ...] = (), **changes: object) -> Guard:
    made = Guard(dataclasses.replace(TRAINING, **changes), {})
    for loss, norm in zip(losses or norms, norms or losses, strict=True):
        assert made.after(applied(loss), norm) == (None, False)
    return made


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_the_limit_is_the_median_of_the_last_updates_times_the_factor(action):
    assert guard(norms=(1.0, 9.0), spike=action).limits() == NO_LIMITS, "nothing is a spike before the window is full"
    assert guard(norms=(9.0, 1.0, 4.0, 3.0), spike=action).limits() == Limits(norm=6.0)
    assert guard(losses=(9.0, 1.0, 4.0, 3.0), spike=action, spike_measure="loss").limits() == Limits(loss=6.0)


@pytest.mark.parametrize("action", ["off", "log"])
def test_without_a_limit_every_step_is_applied(action):
    assert guard(norms=(1.0, 1.0, 1.0), spike=action).limits() == NO_LIMITS


def test_a_spike_is_noted(capsys):
    watch = guard(norms=(1.0, 1.0, 1.5), spike="log")
    assert watch.after(applied(5.0), 2.5) == ("the gradient's norm 2.5 is above 2; it was applied", False)
    watch = guard(losses=(1.0, 1.0, 1.5), spike="log", spike_measure="loss")
    assert watch.after(applied(2.5), 0.1) == ("the loss 2.5 is above 2; it was applied", False)


def test_a_spike_counts_as_a_bad_step_or_ends_the_run():
    watch = guard(spike="skip")
    assert [watch.after(skipped(spike=True), 9.0)[1] for _ in range(2)] == [False, True]
    assert guard(spike="stop").after(skipped(spike=True), 9.0) == ("bad", True)
    assert guard(spike="stop").after(skipped(spike=False), math.inf) == ("bad", False)


def test_a_good_step_starts_the_count_anew_and_a_search_for_the_loss_scale_does_not_count():
    watch = guard()
    seeking = StepResult(loss=1.0, applied=False, asked=Request.NOTHING)
    for result in (skipped(spike=False), applied(1.0), skipped(spike=False), seeking):
        assert not watch.after(result, 1.0)[1]
    assert watch.after(skipped(spike=False), 1.0)[1]


def test_it_continues_from_its_state():
    first = guard(norms=(9.0, 0.1 + 0.2, 4.0, 3.0), spike="skip")
    first.after(skipped(spike=True), 99.0)
    again = Guard(dataclasses.replace(TRAINING, spike="skip"), json.loads(json.dumps(first.state_dict())))
    assert again.limits() == first.limits() and again.state_dict() == first.state_dict()
    assert again.after(skipped(spike=True), 99.0)[1]
