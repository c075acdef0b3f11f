from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
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
        "SIGTERM: saving a checkpoint after this step, then stopping\n"
        "SIGUSR1: saving a checkpoint after this step, then continuing\n"
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
    assert "nothing to save" in capfd.readouterr().err


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


def test_an_end_that_is_under_way_is_not_broken_off_by_a_stop():
    """A launcher tells the ranks that are left to stop, while they find out which one is lost."""
    with pytest.raises(RuntimeError, match="lost peer"), ending_quietly():
        try:
            raise RuntimeError("lost peer")
        finally:
            send(signal.SIGTERM, signal.SIGINT)


ORPHAN = """
    import os, sys, time
    os.environ["TORCHELASTIC_RUN_ID"] = "x"
    from cook.base.signals import heed_launcher
    if os.fork():  # the launcher: it goes at once, or once its rank is at work
        time.sleep(float(sys.argv[1]))
        os._exit(0)
    time.sleep(float(sys.argv[2]))
    try:
        heed_launcher()
    except Exception as error:
        print(type(error).__name__, error, flush=True)
        os._exit(0)
    print("at work", flush=True)
    time.sleep(60)
    print("still here", flush=True)
"""


@pytest.mark.parametrize(("launcher", "rank"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_launcher_that_goes_takes_its_ranks_along_from_the_first_line(launcher, rank):
    # Under a shell that goes too, so that no Python process is left above the rank.
    script = [sys.executable, "-c", textwrap.dedent(ORPHAN), str(launcher), str(rank)]
    process = subprocess.run(["setsid", *script], capture_output=True, text=True, timeout=30)
    if rank:
        assert "Interrupted the launcher ended" in process.stdout or "at work" in process.stdout
    else:
        assert "at work" in process.stdout and "the launcher has ended: stopping" in process.stderr
    assert "still here" not in process.stdout
