from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from cook.base.signals import STOP_SIGNALS, StopSignals


@pytest.fixture(autouse=True)
def handlers():
    before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    yield before
    assert {s: signal.getsignal(s) for s in STOP_SIGNALS} == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_the_next_one_acts(number, handlers):
    caught = []
    before = signal.signal(number, lambda *_: caught.append(number))
    try:
        with StopSignals(patience=0.2) as stop:
            assert not stop.asked
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a launcher's copy of the first
            assert stop.asked and not caught
            time.sleep(0.25)
            os.kill(os.getpid(), number)
            assert caught == [number]
    finally:
        signal.signal(number, before)


def test_an_error_inside_restores_the_handlers():
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError


def test_another_thread_only_gets_the_flag():
    seen = []

    def enter():
        with StopSignals() as stop:
            seen.append(stop.asked)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]
