"""Console output of a run: a progress bar on a terminal, plain lines elsewhere, and tables without truncation."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from rich.text import Text

from cook.report.tables import human_count, human_duration, plain_table

REFRESHES = 4
"""Of a progress bar, per second."""


class Progress:
    """The progress of one stage: a bar on a terminal, elsewhere lines.

    The lines are those of the first and the last step, and at most one every `every` seconds between them.

    Args:
        stage: The name of the stage.
        total_steps: The step at which the stage ends.
        start_step: Number of steps before this run resumed. They do not count for the remaining time.
        enabled: False: print nothing. For all ranks except rank 0.
        every: Seconds between plain lines.
        final_target: The final sparsity target, if the stage learns masks.
        unit: The unit that the speed counts per second.
        stream: Where to print. Default: standard output.
        clock: Returns monotonic seconds.
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        *,
        every: float = 5.0,
        final_target: float | None = None,
        unit: str = "tok",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stage, self._total, self._start_step, self._every = stage, total_steps, start_step, every
        self._final_target, self._clock, self._enabled, self._unit = final_target, clock, enabled, unit
        self._stream = stream or sys.stdout
        self._started = clock()
        self._shown = -math.inf
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        if enabled:
            self._start_bar()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        utilisation: float | None = None,
        sparsity: Callable[[], tuple[float, float]] | None = None,
    ) -> None:
        """Shows the progress of the stage.

        Args:
            step: Number of finished steps, including those before a resume.
            loss: The training loss in nats per token.
            tokens_per_second: The speed over all ranks.
            utilisation: The share of the cards' peak FLOP/s that the model's products reach, from 0 to 1.
            sparsity: Returns the current expected sparsity and its target, from 0 to 1; called if they are shown now.
        """
        now = self._clock()
        every = self._every if self._bar is None else 1 / REFRESHES
        if not self._enabled or (now - self._shown < every and step < self._total):
            return
        self._shown = now
        parts = [] if loss is None else [f"loss {loss:.3f}"]
        parts += [] if tokens_per_second is None else [f"{human_count(tokens_per_second)} {self._unit}/s"]
        parts += [] if utilisation is None else [f"{100 * utilisation:.0f}% of peak FLOP/s"]
        if sparsity is not None:
            text = "sparsity {:.3f} → {:.3f}".format(*sparsity())
            parts.append(text + ("" if self._final_target is None else f" (target {self._final_target:.3f})"))
        parts.append(f"ETA {human_duration(self._seconds_left(step))}")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers="  ".join(parts))
            return
        count = f"{step:>{len(str(self._total))}}/{self._total}"
        _say(self._stream, "  ".join([self._stage, count, *parts]))

    def note(self, text: str) -> None:
        """Prints a separate line, above the progress bar if there is one."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            _say(self._stream, text)

    def close(self) -> None:
        """Stops the progress bar and leaves it on the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._enabled = False

    def _seconds_left(self, step: int) -> float:
        done = step - self._start_step
        return math.inf if done <= 0 else (self._clock() - self._started) / done * max(0, self._total - step)

    def _start_bar(self) -> None:
        console = Console(file=self._stream)
        if not console.is_interactive:
            return
        # Texts may contain brackets, which rich would interpret as markup.
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.completed}/{task.total}", markup=False),
            # Wraps on a narrow terminal, where rich would truncate it by default.
            TextColumn("{task.fields[numbers]}", markup=False, table_column=Column(overflow="fold")),
        )
        self._bar = RichProgress(*columns, console=console, refresh_per_second=REFRESHES)
        self._task = self._bar.add_task(self._stage, total=self._total, completed=self._start_step, numbers="")
        self._bar.start()


def print_table(
    rows: Sequence[Mapping[str, object]], *, title: str | None = None, stream: TextIO | None = None
) -> None:
    """Prints rows as a table: with rich on a terminal, as aligned plain text elsewhere. No text is truncated.

    Each row maps column headers to values; None is an empty cell. Columns are in the order of their first use.
    """
    stream = stream or sys.stdout
    headers = list(dict.fromkeys(header for row in rows for header in row))
    cells = [["" if row.get(header) is None else str(row[header]) for header in headers] for row in rows]
    console = Console(file=stream)
    plain = plain_table(headers, cells) if headers else ""
    # If the terminal is narrower than the table, rich would break words, so plain lines are printed instead.
    if headers and console.is_interactive and max(map(cell_len, plain.splitlines())) + 2 * len(headers) < console.width:
        table = Table(title=None if title is None else Text(title), title_justify="left")
        for column, header in enumerate(headers):
            table.add_column(Text(header), justify="right" if column else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))  # Text: brackets in a cell are not markup
        console.print(table)
        return
    _say(stream, "\n".join(part for part in (title, plain) if part))


def print_plan(
    facts: Mapping[str, object],
    stages: Sequence[Mapping[str, object]],
    *,
    title: str = "plan",
    stream: TextIO | None = None,
) -> None:
    """Prints the plan of a run: facts as `name: value` lines, then a table with one row per stage."""
    stream = stream or sys.stdout
    width = max((len(name) for name in facts), default=0) + 1
    lines = [f"{name + ':':<{width}} {value}" for name, value in facts.items()]
    _say(stream, "\n".join([title, *(f"  {line}" for line in lines)]))
    if stages:
        print_table(stages, stream=stream)


def _say(stream: TextIO, text: str) -> None:
    # Characters that the stream cannot encode become question marks, and errors such as a full disk are ignored:
    # neither may end a training run.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError):
        print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
