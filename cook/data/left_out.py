"""What readers leave out, counted by reason: it ends in a cached folder's manifest, on the console and in the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMED = 5
"""Maximal number of names listed per reason. The count includes the others."""


class LeftOut:
    """Counts by reason. A reason is a plural: `empty documents`.

    Args:
        record: What `record` gave.
    """

    def __init__(self, record: Mapping[str, Mapping[str, Any]] | None = None):
        self._counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}
        self.include(record or {})

    def add(self, reason: str, count: int = 1, *names: str) -> None:
        """Counts what is left out for a reason; a count of 0 changes nothing."""
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
        """How many were left out for a reason."""
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
