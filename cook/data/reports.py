"""What a data preparation reports: its progress, and what it leaves out."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

NAMED = 5
"""Maximal number of names listed per reason. The count includes the others."""

REPEAT_SECONDS = 5.0
REDRAW_SECONDS = 0.2


class LeftOut:
    """Counts of what is left out by reason, a plural such as `empty documents`; begins with what `record` gave.

    It is stored in a cached folder's manifest, printed and logged.
    """

    def __init__(self, record: Mapping[str, Mapping[str, Any]] | None = None):
        self._counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}
        self.include(record or {})

    def add(self, reason: str, count: int = 1, *names: str) -> None:
        """Adds to the count of a reason; a count of 0 changes nothing."""
        if count:
            self._counts[reason] = self._counts.get(reason, 0) + count
            known = self._names.setdefault(reason, [])
            known += names[: NAMED - len(known)]

    def include(self, record: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds what another one recorded."""
        for reason, found in record.items():
            self.add(reason, found["count"], *found["named"])

    def record(self) -> dict[str, dict[str, Any]]:
        """The counts and names as JSON."""
        return {reason: {"count": count, "named": self._names[reason]} for reason, count in self._counts.items()}

    def count(self, reason: str) -> int:
        return self._counts.get(reason, 0)

    def sentences(self, where: str) -> list[str]:
        """A line for every reason."""
        return [f"{where}: left out: {text}" for text in self._texts()]

    def __str__(self) -> str:
        return "; ".join(self._texts())

    def __bool__(self) -> bool:
        return bool(self._counts)

    def _texts(self) -> list[str]:
        texts = []
        for reason, count in self._counts.items():
            names = self._names[reason]
            more = ", …" if names and count > len(names) else ""
            texts.append(f"{reason}: {count:,}" + (f" ({', '.join(names)}{more})" if names else ""))
        return texts


class Progress:
    """A context manager with a progress line on standard error: redrawn on a terminal, repeated elsewhere.

    Args:
        title: What is being done.
        total: Amount of work in bytes; 0 if unknown.
    """

    def __init__(self, title: str, total: float):
        self._title, self._total = title, total
        self._terminal = sys.stderr.isatty()
        self._done = 0.0
        self._begin = self._shown = time.monotonic()

    def advance(self, amount: float) -> None:
        """Adds `amount` bytes to the work done."""
        self._done += amount
        now = time.monotonic()
        if now - self._shown >= (REDRAW_SECONDS if self._terminal else REPEAT_SECONDS):
            self._shown = now
            self._show()

    def _show(self) -> None:
        seconds = time.monotonic() - self._begin
        line = f"{self._title}: {self._done / 1e6:.1f}"
        if self._total and self._done:
            left = seconds * max(self._total - self._done, 0.0) / self._done
            line += f" of {self._total / 1e6:.1f} MB, {min(self._done / self._total, 1.0):.0%}, {left:.0f} s left"
        else:
            line += f" MB, {seconds:.0f} s"
        print(f"\r\x1b[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
