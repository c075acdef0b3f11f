"""Worker processes that end when their parent ends, even if the parent is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import connection
from typing import Any, TypeVar

Result = TypeVar("Result")


def num_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """Makes this worker end as soon as its parent has ended, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_order(
    function: Callable[..., Result],
    jobs: Iterable[tuple],
    workers: int,
    initializer: Callable[..., None] | None = None,
    arguments: tuple = (),
) -> Iterator[Result]:
    """Computes `function(*job)` for every job in several processes, and yields the results in the order of the jobs.

    The processes are spawned, not forked, because this process may hold threads and a device. With one worker, all jobs
    run in this process. At most `2 * workers` jobs are submitted ahead of the results that have been read.
    `function` must be at the top level of a module, so that it can be pickled. `initializer(*arguments)` runs once per
    process.
    """
    if workers <= 1:
        if initializer is not None:
            initializer(*arguments)
        yield from (function(*job) for job in jobs)
        return
    pending: list[Future] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (initializer, arguments)) as pool:
        submitted = (pool.submit(function, *job) for job in jobs)
        try:
            pending += islice(submitted, 2 * workers)
            while pending:
                yield pending.pop(0).result()
                pending += islice(submitted, 1)
        finally:
            for future in pending:
                future.cancel()


def _start(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
    end_with_parent()
    if initializer is not None:
        initializer(*arguments)
