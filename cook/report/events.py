"""The log of a stage: one JSON object per line, and the same scalars for TensorBoard.

A training record is `{"step", "loss", "learning_rate", "tokens", "tokens_per_second", "data_wait", "grad_norm"}`.
`tokens` counts from the start of the stage. `data_wait` is the fraction of the time since the last record that was
spent waiting for data. `flops_per_second` is the work of the model and its teacher, without what checkpointing computes
again, and `flops_utilisation` its share of the cards' published peak, where the card is known. In stages that learn
masks, the record also has `expected_sparsity`, `target_sparsity` and `lambda`. Each of these maps a constraint's name
to a float (`lambda` also to named floats, as in `{"lambda1": …, "lambda2": …}`). A step that was not applied, or was a
spike, also has `problem`, and `samples`: the samples that each rank read in it. An evaluation record is `{"step",
"held_out_loss"}`. A change of the source weights is `{"step", "source_loss", "source_weight"}`. The first record of a
stage may be `{"step", "data"}`: sentences about the content of the rows and about data that was left out.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from cook.base.distributed import warn
from cook.base.errors import UserError
from cook.base.files import naming, write_atomically

LOG_NAME = "log.jsonl"
TIMES = ("tokens_per_second", "data_wait", "flops_per_second", "flops_utilisation")
"""Fields that depend on the machine's speed. All others are the same in a resumed run."""
TENSORBOARD_NAME = "tensorboard"

MAX_CONSTRAINT_CHARTS = 8
"""With more constraints, TensorBoard gets only their mean, minimum and maximum: hundreds of charts are useless."""
_CONSTRAINT_FIELDS = {"expected_sparsity": "expected", "target_sparsity": "target", "lambda": "lambda"}


class EventLog:
    """Appends records to `folder/log.jsonl`, and their scalars to `folder/tensorboard`.

    The first record opens the files. If a file cannot be written, the run continues with a warning, and the pending
    records are written with the next record or by `settle`. If not `enabled`, as on all ranks except rank 0, all
    methods do nothing.
    """

    def __init__(self, folder: str | Path, tensorboard: bool = True, enabled: bool = True):
        self.folder = Path(folder)
        self.path = self.folder / LOG_NAME
        self._tensorboard, self._enabled = tensorboard, enabled
        hope = "its records are kept in memory and stored in the checkpoints until it can be written"
        self._lines = _Growing(self.path, hope)
        self._events: _Growing | None = None
        self._purge_step: int | None = None
        self._again: list[dict[str, Any]] = []

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record to the file.

        Values are numbers, zero-dimensional tensors or arrays, strings, None, and lists or mappings of these. A number
        that is not finite becomes null, and the record's `non_finite` maps its place (`lambda/heads.3`) to its name.

        Raises:
            ValueError: The record has no whole, non-negative `step`.
            TypeError: A value is of another type; nothing is written then.
        """
        if not self._enabled:
            return
        step = _plain(record.get("step"))
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"a log record needs a whole number >= 0 as its step, got {record.get('step')!r}")
        notes: dict[str, str] = {}
        finite = _finite(record, "", notes)
        if notes:
            finite["non_finite"] = notes
        self._lines.add(f"{json.dumps(finite, ensure_ascii=False, allow_nan=False)}\n".encode())
        if self._tensorboard:
            self._write_scalars(finite)

    def rewind(self, step: int, waiting: Sequence[str] = ()) -> None:
        """Removes all records after `step`.

        An evaluation at `step` is removed too, because it comes after the checkpoint and is repeated. The file is
        replaced atomically. TensorBoard hides `step` and later steps of its earlier event files; the records of `step`
        that the log keeps are written there again.

        Args:
            step: The step from which the run resumes. -1 removes all records.
            waiting: The lines that were `waiting` when the checkpoint was written.

        Raises:
            UserError: A line of the log, other than a last one cut short, is not a JSON object with a step.
            OSError: The log cannot be written.
        """
        if not self._enabled:
            return
        self.close()
        found = list(_records(self.path)) if self.path.exists() else []
        kept = {line: record for line, record in found if record["step"] <= step - ("held_out_loss" in record)}
        kept |= {f"{line}\n".encode(): json.loads(line) for line in waiting}
        if found or kept:
            write_atomically(self.path, b"".join(kept))
        # TensorBoard hides whole steps.
        self._purge_step, self._again = max(step, 0), [record for record in kept.values() if record["step"] == step]

    @property
    def waiting(self) -> tuple[str, ...]:
        """The lines that could not be written yet, to be stored in a checkpoint."""
        return tuple(line.decode().removesuffix("\n") for line in self._lines.waiting)

    def settle(self) -> None:
        """Tries again to write the pending lines. Raises OSError if that fails."""
        self._lines.settle()

    def close(self) -> None:
        """Closes both files. A later `write` opens them again."""
        self._lines.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def _write_scalars(self, record: Mapping[str, Any]) -> None:
        # Importing this takes a second, so it is imported only if needed.
        from cook.report.board import beginning, event_file_name, scalar_event

        if self._events is None:
            folder = self.folder / TENSORBOARD_NAME
            self._events = _Growing(folder / event_file_name(folder), f"{LOG_NAME} has the same numbers")
            again = [scalar_event(record["step"], scalars(record)) for record in self._again]
            self._events.add(beginning(self._purge_step) + b"".join(again))
            self._purge_step, self._again = None, []
        self._events.add(scalar_event(record["step"], scalars(record)))


class _Growing:
    """A file to which complete pieces are appended. Pieces that cannot be written wait in memory for the next one.

    Args:
        path: The file. It must not exist, or contain lines.
        hope: What happens to pieces that cannot be written, for the warning.
    """

    def __init__(self, path: Path, hope: str):
        self.path, self._hope = path, hope
        self.waiting: list[bytes] = []
        self._file: FileIO | None = None
        self._size = 0
        self._warned = False

    def add(self, piece: bytes) -> None:
        """Appends a piece, after the pending ones."""
        self.waiting.append(piece)
        try:
            self.settle()
        except OSError as error:
            if not self._warned:
                warn(f"{self.path}: {error.strerror}; {self._hope}")
            self._warned = True

    def settle(self) -> None:
        """Writes the pending pieces. Raises OSError if that fails."""
        content = b"".join(self.waiting)
        if not content:
            return
        with naming(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._size = _whole_lines(self.path)
                self._file = FileIO(self.path, "a")
            if os.fstat(self._file.fileno()).st_size != self._size:
                self._file.truncate(self._size)  # a crash or a full disk has left a part of a piece
            rest = memoryview(content)
            while rest:
                rest = rest[self._file.write(rest) :]
        self._size, self.waiting = self._size + len(content), []

    def close(self) -> None:
        """Closes the file and discards pending pieces."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file, self.waiting = None, []


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the TensorBoard tags and values of a record, without nulls.

    `loss` becomes `train/loss`. The values of a constraint become `sparsity/<constraint>/expected`, `…/target` and
    `…/lambda` (`…/lambda1` if lambda is named).
    """
    tags: dict[str, float] = {}
    for name, value in record.items():
        if name in _CONSTRAINT_FIELDS and isinstance(value, Mapping):
            for part, numbers in by_part(value, _CONSTRAINT_FIELDS[name]).items():
                tags.update({f"sparsity/{who}/{part}": number for who, number in _condensed(numbers).items()})
        elif name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
            tags[name if "/" in name else f"train/{name}"] = float(value)
    return tags


def by_part(values: Mapping[str, Any], default: str) -> dict[str, dict[str, float]]:
    """Regroups a record's `{constraint: float or {part: float}}` as `{part: {constraint: float}}`, without nulls.

    `default` is the part of plain floats.
    """
    parts: dict[str, dict[str, float]] = {}
    for constraint, value in values.items():
        for part, number in (value if isinstance(value, Mapping) else {default: value}).items():
            if number is not None:
                parts.setdefault(part, {})[constraint] = float(number)
    return parts


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Reads a `log.jsonl`. An incomplete last line, as after a crash, is ignored.

    Raises:
        UserError: The file does not exist, or another line is not a JSON object with a step.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such log", remedy="name the log.jsonl of a stage that has run")
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise UserError(
                    f"{path}: line {number} is not a log record",
                    wanted="a JSON object with a whole number as its step",
                    got=line[:80].decode("utf-8", "replace").rstrip("\n"),
                    remedy="remove the line, or remove the file to start a new log",
                )
            yield line, record


def _whole_lines(path: Path) -> int:
    """The number of bytes up to the last line end, after which a crash may have left an incomplete line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any, place: str, notes: dict[str, str]) -> Any:
    value = _plain(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item, f"{place}/{key}" if place else str(key), notes) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, f"{place}/{index}", notes) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        notes[place] = str(value)
        return None
    return value


def _condensed(numbers: Mapping[str, float]) -> dict[str, float]:
    if len(numbers) <= MAX_CONSTRAINT_CHARTS:
        return dict(numbers)
    values = list(numbers.values())
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
