"""The log of the gates of a stage that learns masks: how open each gate is, for pictures of the model's structure.

`gates.json` lists the groups of units. `gates.bin` is a sequence of records: the step as a little-endian uint32, then
one byte per unit, the probability that the unit is kept times 255, in the order of `gates.json`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from cook.base.distributed import warn
from cook.base.errors import UserError
from cook.base.files import naming, read_json, write_json

GROUPS_NAME, RECORDS_NAME = "gates.json", "gates.bin"
STEP_BYTES = 4
INTERVAL = 1.0  # seconds between two records, at least
DOUBLING = 32 * 1024**2
"""Bytes of records after which the interval doubles, so that a long run of a large model stays below a gigabyte."""


@dataclass(frozen=True, kw_only=True)
class GateGroup:
    """Consecutive units of one kind in one place."""

    name: str
    layer: int
    site: str
    """`att` or `ffn`."""
    kind: str
    """`blocks`, `heads` or `dimff`."""
    units: int
    members: int = 1
    """Heads or FFN dimensions per unit."""


class GateLog:
    """Appends records to `folder/gates.bin`.

    A record that cannot be written is left out, with one warning: nobody resumes from this log. If not `enabled`, as on
    all ranks except rank 0, all methods do nothing.
    """

    def __init__(self, folder: str | Path, groups: Sequence[GateGroup], enabled: bool = True):
        self.path, self.groups_path = Path(folder) / RECORDS_NAME, Path(folder) / GROUPS_NAME
        self._described = {"version": 1, "groups": [asdict(group) for group in groups]}
        self._record_bytes = STEP_BYTES + sum(group.units for group in groups)
        self._enabled, self._warned = enabled, False
        self._size, self._last = 0, -float("inf")

    def rewind(self, step: int) -> None:
        """Removes all records after `step`; -1 removes all. Call it before the first record.

        The records are replaced by a new file, so that a program that follows them notices.
        """
        if not self._enabled:
            return
        with self._forgiven():
            self._size = 0
            if step >= 0 and self._is_described():
                steps = list(_steps(self.path, self._record_bytes))
                kept = next((number for number, found in enumerate(steps) if found > step), len(steps))
                self._size = kept * self._record_bytes
            else:
                self.path.unlink(missing_ok=True)
                write_json(self.groups_path, self._described)
            if self.path.exists() and self.path.stat().st_size != self._size:
                self._cut()

    def is_due(self, *, last: bool) -> bool:
        """Whether to write a record now. The last step of a stage always has one."""
        interval = INTERVAL * 2.0 ** (self._size // DOUBLING)
        return self._enabled and (last or time.monotonic() - self._last >= interval)

    def write(self, step: int, probabilities: torch.Tensor) -> None:
        """Appends a record; `probabilities` are `[units]`."""
        self._last = time.monotonic()
        values = (probabilities.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy().tobytes()
        record = step.to_bytes(STEP_BYTES, "little") + values
        assert len(record) == self._record_bytes, "the probabilities of other groups"
        with self._forgiven(), FileIO(self.path, "a") as file:
            if os.fstat(file.fileno()).st_size != self._size:
                file.truncate(self._size)  # a full disk has left a part of a record
            rest = memoryview(record)
            while rest:
                rest = rest[file.write(rest) :]
            self._size += len(record)

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            with naming(self.path):
                yield
        except OSError as error:
            if not self._warned:
                warn(f"{error.filename}: {error.strerror}; the picture of the structure lacks these steps")
            self._warned = True

    def _is_described(self) -> bool:
        try:
            return self.path.exists() and read_json(self.groups_path) == self._described
        except UserError:
            return False

    def _cut(self) -> None:
        aside = self.path.with_name(f".{self.path.name}.tmp")
        try:
            shutil.copyfile(self.path, aside)
            os.truncate(aside, self._size)
            os.replace(aside, self.path)
        except OSError:
            os.truncate(self.path, self._size)  # the disk is full
        finally:
            aside.unlink(missing_ok=True)


def read_gate_log(folder: str | Path) -> tuple[list[dict[str, Any]], list[tuple[int, bytes]]]:
    """The groups of a stage and its records, each a step and one byte per unit. An incomplete last record is ignored.

    Raises:
        UserError: the stage has no log of its gates.
    """
    groups = read_json(Path(folder) / GROUPS_NAME)["groups"]
    size = STEP_BYTES + sum(group["units"] for group in groups)
    path = Path(folder) / RECORDS_NAME
    content = path.read_bytes() if path.exists() else b""
    records = [content[start : start + size] for start in range(0, len(content) - size + 1, size)]
    return groups, [(int.from_bytes(record[:STEP_BYTES], "little"), record[STEP_BYTES:]) for record in records]


def _steps(path: Path, record_bytes: int) -> Iterator[int]:
    """The step of every whole record."""
    with open(path, "rb") as file:
        for start in range(0, os.fstat(file.fileno()).st_size - record_bytes + 1, record_bytes):
            file.seek(start)
            yield int.from_bytes(file.read(STEP_BYTES), "little")
