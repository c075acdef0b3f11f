"""The controller: accepts jobs, starts and stops their attempts, and follows them. Skeleton of the interface."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cook.service.jobs import Conflict, Job, JobStore, State

__all__ = ["Conflict", "Controller", "Subscription"]


class Subscription:
    """Changes of jobs for one reader. Only the newest state of each job waits, so a slow reader costs little memory.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, controller: Controller, notify: Callable[[], None] | None = None):
        raise NotImplementedError

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, timeout: float | None = None) -> list[Job]:
        """Waits for changes and returns the changed jobs; empty after the timeout, or when closed."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Controller:
    """Runs jobs.

    Args:
        home: The home folder of the service.
        database: URL of the index; None: SQLite in the home folder.
        poll: Seconds between two looks at the running jobs.
        executors: By name; None: `local`, and `slurm` where `sbatch` is installed.
    """

    def __init__(
        self, home: Path, *, database: str | None = None, poll: float = 1.0, executors: dict[str, Any] | None = None
    ):
        self.home = Path(home)
        self.store = JobStore(self.home)

    def submit(self, spec: dict[str, Any], config: dict[str, Any], scheme: dict[str, Any]) -> Job:
        """Creates a job, or returns the one that the same owner created with the same idempotency key.

        `spec["idempotency_key"]` and `spec["body_hash"]` may be None: then every call creates a job.

        Raises:
            Conflict: the key was used with another body.
            UserError: no executor can run it.
        """
        raise NotImplementedError

    def list(
        self,
        *,
        owner: str | None = None,
        state: State | Sequence[State] | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> builtins.list[Job]:
        """Jobs from the index, newest first; `after`: only those older than the job with this id."""
        raise NotImplementedError

    def count(self, *, owner: str | None = None) -> dict[State, int]:
        """How many jobs there are in each state (for limits)."""
        raise NotImplementedError

    def get(self, id: str) -> Job:
        """Raises KeyError if there is no such job."""
        raise NotImplementedError

    def stop(self, id: str, *, now: bool = False) -> Job:
        """Requests a stop. Raises Conflict if the job has ended, KeyError if there is none."""
        raise NotImplementedError

    def resume(self, id: str) -> Job:
        """Queues the next attempt of a stopped, failed or lost job. Raises Conflict otherwise."""
        raise NotImplementedError

    def remove(self, id: str) -> None:
        """Deletes a job that has ended, with its files. Raises Conflict otherwise."""
        raise NotImplementedError

    def start(self) -> None:
        """Takes HOME/server.lock, reads the folders and starts the thread. Jobs that run are attached to.

        Raises:
            UserError: another server uses the home folder.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Ends the thread. Running jobs continue; the next `start` attaches to them."""
        raise NotImplementedError

    def subscribe(self, notify: Callable[[], None] | None = None) -> Subscription:
        """Changes of all jobs from now on; `notify` is called from another thread when one is waiting."""
        raise NotImplementedError
