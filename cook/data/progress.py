"""The progress line of a data preparation: updated on a terminal, repeated every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

REPEAT_SECONDS = 5.0
REDRAW_SECONDS = 0.2


class Progress:
    """Reports on standard error; used as a context manager.

    Args:
        title: What is being done.
        total: Amount of work, in any unit; 0 if unknown.
        unit: Name of the unit, e.g. `MB`.
        scale: Work amounts are divided by this for display.
    """

    def __init__(self, title: str, total: float, *, unit: str, scale: float = 1.0):
        self._title, self._total, self._unit, self._scale = title, total, unit, scale
        self._terminal = sys.stderr.isatty()
        self._done = 0.0
        self._begin = self._shown = time.monotonic()

    def advance(self, amount: float) -> None:
        """Adds `amount` to what is done."""
        self._done += amount
        now = time.monotonic()
        if now - self._shown >= (REDRAW_SECONDS if self._terminal else REPEAT_SECONDS):
            self._shown = now
            self._show()

    def _show(self) -> None:
        seconds = time.monotonic() - self._begin
        done, total = self._done / self._scale, self._total / self._scale
        line = f"{self._title}: {done:.1f}"
        if total and self._done:
            left = seconds * max(self._total - self._done, 0.0) / self._done
            line += f" of {total:.1f} {self._unit}, {min(self._done / self._total, 1.0):.0%}, {left:.0f} s left"
        else:
            line += f" {self._unit}, {seconds:.0f} s"
        print(f"\r\x1b[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
