"""Batches built ahead of the training step by worker processes; PyTorch's DataLoader runs them."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cook.base.batches import Batch
from cook.base.device import accelerator
from cook.base.errors import RunFailed, UserError
from cook.base.pool import end_with_parent
from cook.data.rows import Rows, by_epoch

AHEAD = 2
"""Steps that each worker holds ready."""


class Plan(NamedTuple):
    """Rows to read: their numbers, and the epoch in which each is read."""

    rows: np.ndarray
    epochs: np.ndarray

    def part(self, some: Any) -> Plan:
        """The rows that an index picks."""
        return Plan(self.rows[some], self.epochs[some])


def build(rows: Rows, plans: Sequence[Plan]) -> list[Batch]:
    """The micro-batches of a rank's share."""
    if not rows.is_redrawn:
        return [rows.batch(plan.rows) for plan in plans]
    return [by_epoch(rows.batch, plan.rows, plan.epochs) for plan in plans]


class Workers:
    """Builds the shares of consecutive steps in `count` processes, in order.

    This process sets the order and sends it to them; they only read rows and build tensors, so their number changes
    nothing. The first request starts them, forked from a clean process that has PyTorch loaded (from this one they
    would inherit locks that its threads hold). They end with `close`, or with this process, however it ends. This
    process raises their `UserError` unchanged.

    Args:
        rows: What to read; pickled for each worker.
        plans: A rank's share of any step.
        count: Number of processes, at least 1.
    """

    def __init__(self, rows: Rows, plans: Callable[[int], Sequence[Plan]], count: int):
        self._steps = _Steps(plans)
        self._next = 0
        self._iterator: Any = None
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.utils.data", __name__])
        self._loader: DataLoader | None = DataLoader(
            _Shares(rows),
            sampler=self._steps,
            batch_size=None,
            num_workers=count,
            prefetch_factor=AHEAD,
            persistent_workers=True,
            multiprocessing_context=context,
            worker_init_fn=_begin,
            pin_memory=accelerator() is not None,
        )

    def take(self, step: int) -> list[Batch]:
        """A step's share. Steps in order are ready; any other step drops what was built ahead.

        Raises:
            RunFailed: A worker died.
        """
        assert self._loader is not None, "closed"
        if self._iterator is None or step != self._next:
            self._steps.start = step
            self._iterator = iter(self._loader)
        try:
            share = next(self._iterator)
        except (RuntimeError, EOFError, OSError) as error:  # the last two: it died while a batch was on its way
            raise RunFailed(f"a worker process of the data loader failed at step {step + 1}: {error!r}") from error
        if isinstance(share, UserError):
            raise share
        self._next = step + 1
        return share

    def drop(self) -> None:
        """Forgets what was built ahead: the order has changed."""
        self._next = -1

    def close(self) -> None:
        """Ends the processes."""
        if self._iterator is not None:
            # Dropping the iterator is not enough: tracebacks keep it alive after an error.
            self._iterator._shutdown_workers()
        self._iterator = self._loader = None


def _begin(_: int) -> None:
    # The worker's parent is the fork server, so it would not notice a SIGKILL of this process.
    end_with_parent()
    # A signal to the whole group asks the run to save and stop; the run needs the worker until then.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Steps:
    """DataLoader's sampler: the shares of `start`, `start + 1`, … without end."""

    def __init__(self, plans: Callable[[int], Sequence[Plan]]):
        self.start, self._plans = 0, plans

    def __iter__(self) -> Iterator[Sequence[Plan]]:
        return (self._plans(step) for step in itertools.count(self.start))


class _Shares(Dataset):
    """DataLoader's data set: from a share's plans to its batches."""

    def __init__(self, rows: Rows):
        self._rows = rows

    def __getitem__(self, plans: Sequence[Plan]) -> list[Batch] | UserError:
        try:
            return build(self._rows, plans)
        except UserError as error:
            return error  # raised, it would arrive wrapped in a traceback
