"""Signal handling: SIGTERM, SIGINT and SIGUSR1 become requests that the training loop checks between steps."""

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

from cook.base.errors import EXIT_INTERRUPTED, Interrupted, RunFailed, write_to_stderr
from cook.base.outcome import note_end
from cook.base.processes import launchers


class Request(enum.IntFlag):
    """What a signal requests. Requests of several ranks or signals are combined."""

    NOTHING = 0
    SAVE = 1  # write a checkpoint after this step and continue
    STOP = 2  # write a checkpoint after this step and stop
    SETTLE = 4  # not from a signal: a background save has failed on some rank, and all ranks must handle it together


# Seconds that a process may take to end by itself after its launcher has ended, outside the training steps.
EXIT_LIMIT = 10.0
MEANING = {signal.SIGTERM: Request.STOP, signal.SIGINT: Request.STOP, signal.SIGUSR1: Request.SAVE}


class Signals:
    """A context in which signals are recorded as requests instead of ending the process.

    Repeated signals change nothing: neither a second Ctrl-C nor the launcher's copy of the first interrupts a save.
    """

    def __init__(self) -> None:
        self._asked = Request.NOTHING
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in MEANING}
        return self

    def take(self) -> Request:
        """Returns the requests since the last call. A stop request stays set."""
        # Clearing all flags would lose a signal that arrives between the two lines.
        asked = self._asked
        self._asked &= ~(asked & Request.SAVE)
        return asked

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        asked = MEANING[signal.Signals(number)]
        if asked not in self._asked:
            then = "then stopping" if asked == Request.STOP else "then continuing"
            write_to_stderr(f"{signal.Signals(number).name}: saving a checkpoint after this step, {then}")
        self._asked |= asked

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        self._before = {}


@contextlib.contextmanager
def ending_quietly() -> Iterator[None]:
    """Handles signals outside the training loop: SIGTERM and SIGINT raise `Interrupted`, SIGUSR1 prints a note.

    Nothing is lost by stopping there: a stage that is being set up or finished resumes from its last checkpoint.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        # A launcher that has seen another rank die sends SIGTERM while this rank already ends for the same reason.
        if not isinstance(sys.exc_info()[1], RuntimeError | RunFailed | Interrupted):
            raise Interrupted(
                f"{signal.Signals(number).name} outside the training steps; the same command resumes the run"
            )

    def nothing_to_save(_number: int, _frame: FrameType | None) -> None:
        write_to_stderr("SIGUSR1: nothing to save at this moment")

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
    """Makes this process end when its launcher ends, as if it had received SIGTERM. A command calls this first.

    Outside the training loop there is nothing to save, and the main thread may be inside a call that does not handle
    signals, waiting for ranks that have ended. The process then ends after `EXIT_LIMIT` seconds. Inside the loop the
    ranks save a checkpoint first, and the watchdog limits the time.

    Raises:
        Interrupted: the launcher has already ended.
    """
    watched = launchers()
    if watched is None:
        raise Interrupted("the launcher ended before the run began")

    def watch() -> None:
        while all(process.fate() != "dead" for process in watched):
            time.sleep(0.5)
        write_to_stderr("the launcher has ended: stopping as if it had sent SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(EXIT_LIMIT)
            if not isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), Signals):
                message = (
                    "stopped: the launcher has ended, outside the training steps; the same command resumes the run"
                )
                write_to_stderr(message)
                # Its folder may be on a machine that was lost.
                noting = threading.Thread(target=note_end, args=(EXIT_INTERRUPTED, message), daemon=True)
                noting.start()
                noting.join(EXIT_LIMIT)
                os._exit(EXIT_INTERRUPTED)

    if watched:
        threading.Thread(target=watch, name="launcher", daemon=True).start()
