from __future__ import annotations

import os
import signal
import threading

import pytest

from cook.base.errors import Interrupted
from cook.base.signals import MEANING, Request, Signals, ending_quietly


@pytest.fixture(autouse=True)
def handlers():
    before = {s: signal.getsignal(s) for s in MEANING}
    yield before
    assert {s: signal.getsignal(s) for s in MEANING} == before


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_stays_asked_however_often_it_comes(number):
    with Signals() as signals:
        assert signals.take() == Request.NOTHING
        send(number, number)
        assert signals.take() == signals.take() == Request.STOP
        send(number)
        assert signals.take() == Request.STOP


def test_a_save_is_asked_once_a_signal():
    with Signals() as signals:
        send(signal.SIGUSR1, signal.SIGUSR1)
        assert signals.take() == Request.SAVE and signals.take() == Request.NOTHING
        send(signal.SIGUSR1, signal.SIGTERM)
        assert signals.take() == Request.SAVE | Request.STOP and signals.take() == Request.STOP


def test_it_says_what_it_heard_once(capfd):
    with Signals():
        send(signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)
    assert capfd.readouterr().err == (
        "SIGTERM: saving after this step, then stopping\nSIGUSR1: saving after this step, and going on\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outside_the_steps_a_stop_ends_at_once(number):
    with pytest.raises(Interrupted, match=number.name), ending_quietly():
        send(number)


def test_outside_the_steps_a_save_is_nothing(capfd):
    with ending_quietly():
        with Signals() as signals:
            send(signal.SIGUSR1)
            assert signals.take() == Request.SAVE
        send(signal.SIGUSR1)
    assert "nothing new to save" in capfd.readouterr().err


@pytest.mark.parametrize("manager", [Signals, ending_quietly])
def test_an_error_inside_restores_the_handlers(manager):
    with pytest.raises(ZeroDivisionError), manager():
        raise ZeroDivisionError


def test_another_thread_only_gets_the_requests():
    seen = []

    def enter():
        with ending_quietly(), Signals() as signals:
            seen.append(signals.take())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [Request.NOTHING]
