"""SIGTERM, SIGINT and SIGUSR1 as requests that the loop looks at between steps."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from cook.base.errors import Interrupted


class Request(enum.IntFlag):
    """What a signal asks of a run; requests of several ranks or signals add up."""

    NOTHING = 0
    SAVE = 1
    """Write a checkpoint after this step, and go on."""
    STOP = 2
    """Write a checkpoint after this step, and end."""
    SETTLE = 4
    """No signal's: a save in the background has failed on some rank, and all of them must hear of it."""


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


def _say(text: str) -> None:
    # print() may itself be what the signal interrupted, and is not reentrant.
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
