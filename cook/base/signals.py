"""SIGTERM, SIGINT and SIGUSR1 as requests that the loop looks at between steps; the launcher's end as a SIGTERM."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from cook.base.errors import EXIT_INTERRUPTED, Interrupted, RunFailed
from cook.base.processes import launchers


class Request(enum.IntFlag):
    """What a signal asks of a run; requests of several ranks or signals add up."""

    NOTHING = 0
    SAVE = 1
    """Write a checkpoint after this step, and go on."""
    STOP = 2
    """Write a checkpoint after this step, and end."""
    SETTLE = 4
    """No signal's: a save in the background has failed on some rank, and all of them must hear of it."""


HEARING = 10.0
"""Seconds that a process whose launcher has gone has to end by itself, outside the training steps."""

MEANING = {signal.SIGTERM: Request.STOP, signal.SIGINT: Request.STOP, signal.SIGUSR1: Request.SAVE}


class Signals:
    """While it is entered, signals are remembered as requests instead of ending the process.

    However many come, and however often: a second Ctrl-C or a launcher's copy of the first never breaks off the saving.
    """

    def __init__(self) -> None:
        self._asked = Request.NOTHING
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in MEANING}
        return self

    def take(self) -> Request:
        """What has been asked since the last call; a stop stays asked."""
        # A signal between the two lines would be lost if the flags were simply cleared.
        asked = self._asked
        self._asked &= ~(asked & Request.SAVE)
        return asked

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        asked = MEANING[signal.Signals(number)]
        if asked not in self._asked:
            then = "then stopping" if asked == Request.STOP else "and going on"
            _say(f"{signal.Signals(number).name}: saving after this step, {then}")
        self._asked |= asked

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        self._before = {}


@contextlib.contextmanager
def ending_quietly() -> Iterator[None]:
    """Outside the training loop: SIGTERM and SIGINT raise `Interrupted`, SIGUSR1 finds nothing to save.

    Nothing is lost by ending there: a stage that is being set up or finished is gone on from its last checkpoint.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        # A launcher that has seen another rank die sends SIGTERM while this one is on its way out for the same reason.
        if not isinstance(sys.exc_info()[1], RuntimeError | RunFailed | Interrupted):
            raise Interrupted(f"{signal.Signals(number).name} outside the training steps; the same command goes on")

    def nothing_to_save(_number: int, _frame: FrameType | None) -> None:
        _say("SIGUSR1: there is nothing new to save now")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: nothing_to_save if asked == Request.SAVE else end for number, asked in MEANING.items()}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heed_launcher() -> None:
    """From here on the launcher's end ends this process too, as a SIGTERM does; a command's first call.

    Before the training steps there is nothing to save, and the main thread may wait inside a call that hears no signal,
    for ranks that have gone: it has a few seconds. In the loop the ranks save first, and the watchdog sets the bound.
    """
    watched = launchers()
    if watched is None:
        raise Interrupted("the launcher has gone before the run began")

    def watch() -> None:
        while all(process.fate() != "dead" for process in watched):
            time.sleep(0.5)
        _say("the launcher has gone: stopping as if it had sent SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(HEARING)
            if not isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), Signals):
                _say("stopped: the launcher has gone, outside the training steps; the same command goes on")
                os._exit(EXIT_INTERRUPTED)

    if watched:
        threading.Thread(target=watch, name="launcher", daemon=True).start()


def _say(text: str) -> None:
    # print() may itself be what the signal interrupted, and is not reentrant.
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
