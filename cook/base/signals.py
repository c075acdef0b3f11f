"""SIGTERM, SIGINT and SIGUSR1 as a flag that the loop looks at between steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """While it is entered, the first stop signal sets `asked`; one that comes `patience` seconds later acts as before.

    In between more signals change nothing: a launcher passes Ctrl-C on to ranks that the terminal has already told.
    """

    def __init__(self, patience: float = 10.0) -> None:
        self.asked = False
        self._patience, self._first = patience, 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._remember) for s in STOP_SIGNALS}
        return self

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._first = True, now
        elif now - self._first >= self._patience:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        self._before = {}

    def __exit__(self, *_: object) -> None:
        self._restore()
