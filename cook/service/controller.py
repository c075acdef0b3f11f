"""The controller: accepts jobs, starts and stops their attempts, and follows them.

Every change is a file in the job's folder first, and a row of the index after it. So the process may be killed between
any two statements: the next one reads the folders, and repeats what was not finished. Rows are written under one lock,
from what the folder says at that moment; so an old view of a job never replaces a newer one.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cook.base.errors import UserError
from cook.service.executors import Executor, LocalExecutor
from cook.service.index import DatabaseError, Index
from cook.service.jobs import ACTIVE, ENDED, WAITING, Conflict, Job, JobStore, State, seconds_since
from cook.service.slurm import SlurmExecutor
from cook.service.subscriptions import Hub, Subscription

__all__ = ["Conflict", "Controller", "Subscription"]

RETRY_DELAY = 5.0  # seconds before the first automatic retry; each further one waits twice as long
LONGEST_DELAY = 300.0
STARTS = 50  # jobs that one round starts at most, so that a long queue does not delay the others


class Controller:
    """Runs jobs.

    Args:
        home: The home folder of the service.
        database: URL of the index; None: SQLite in the home folder.
        poll: Seconds between two looks at the running jobs.
        executors: By name; None: `local`, and `slurm` where `sbatch` is installed.
        retry_delay: Seconds before the first automatic retry.

    Raises:
        UserError: another server uses the home folder, or the database cannot be used.
    """

    def __init__(
        self,
        home: Path,
        *,
        database: str | None = None,
        poll: float = 1.0,
        executors: dict[str, Executor] | None = None,
        retry_delay: float = RETRY_DELAY,
    ):
        self.home = Path(home).absolute()
        self.store = JobStore(self.home)
        self._server = _only_server(self.home)
        self._database, self._poll, self._retry_delay = database, poll, retry_delay
        if executors is None:
            executors = {"local": LocalExecutor()}
            if shutil.which("sbatch"):
                executors["slurm"] = SlurmExecutor()
        self.executors = executors
        self._hub = Hub()
        self._lock = threading.RLock()
        self._unwritten: dict[str, Job] = {}  # by id: what the index could not be told
        self._wake, self._closing = threading.Event(), False
        self._thread: threading.Thread | None = None
        try:
            self.store.clean()
            self._index = Index(self.home, database)
            with self._or_later():
                self._synchronise()
        except BaseException:
            os.close(self._server)
            raise

    def submit(self, spec: dict[str, Any], config: dict[str, Any], scheme: dict[str, Any]) -> Job:
        """Creates a job, or returns the one that the same owner created with the same idempotency key.

        `spec["idempotency_key"]` and `spec["body_hash"]` may be None: then every call creates a job.

        Raises:
            Conflict: the key was used with another body.
            UserError: no executor can run it.
        """
        executor = self.executors.get(str(spec.get("executor", "local")))
        if executor is None:
            raise UserError(f"there is no executor {spec.get('executor')!r}", wanted=", ".join(self.executors))
        if problem := executor.problem(spec):
            raise UserError(problem)
        key, owner = spec.get("idempotency_key"), str(spec.get("owner", ""))
        with self._lock:
            if key and (earlier := self.submitted(owner, key, spec.get("body_hash"))):
                return earlier
            job = self._record(self.store.create(spec, config, scheme))
        self._wake.set()
        return job

    def submitted(self, owner: str, key: str, body_hash: str | None) -> Job | None:
        """The job that an owner has submitted with an idempotency key, if any.

        Raises:
            Conflict: the key was used with another body.
        """
        with self._lock:
            if self._stale:
                self._synchronise()  # a job that is not in the index yet may have the key
            return self._index.submitted(owner, key, body_hash)

    def list(self, **chosen: Any) -> builtins.list[Job]:
        """Jobs, newest first; the arguments are those of `Index.list`."""
        return [self._unwritten.get(job.id, job) for job in self._index.list(**chosen)]

    def count(self, *, owner: str | None = None) -> dict[State, int]:
        """How many jobs there are in each state (for limits)."""
        return self._index.count(owner)

    def get(self, id: str) -> Job:
        """Raises KeyError if there is no such job."""
        return self._unwritten.get(id) or self._index.get(id)

    def stop(self, id: str, *, now: bool = False) -> Job:
        """Requests a stop. Raises Conflict if the job has ended, KeyError if there is none."""
        with self._lock:
            job = self._view(self.store.get(id))
            if job.state in ENDED:
                raise Conflict(f"job {id} has ended: {job.state}")
            if job.state != "stopping" or now:
                # An attempt that has ended cannot be stopped any more; the next one can.
                attempt = job.attempt + 1 if job.state in WAITING else job.attempt
                self.store.want(id, "stop now" if now else "stop", attempt)
            job = self._refresh(id)
        self._wake.set()
        return job

    def resume(self, id: str) -> Job:
        """Queues the next attempt of a stopped, failed or lost job. Raises Conflict otherwise."""
        with self._lock:
            job = self._view(self.store.get(id))
            if job.state not in ("stopped", "failed", "lost"):
                raise Conflict(f"job {id} cannot be resumed: it is {job.state}")
            self.store.want(id, "run", job.attempt + 1)
            job = self._refresh(id)
        self._wake.set()
        return job

    def remove(self, id: str) -> None:
        """Deletes a job that has ended, with its files. Raises Conflict otherwise."""
        with self._lock:
            job = self._view(self.store.get(id))
            if job.state not in ENDED:
                raise Conflict(f"job {id} cannot be removed: it is {job.state}; stop it first")
            self.store.remove(id)
            self._forget(id)

    def start(self) -> None:
        """Starts the thread that runs the jobs. Jobs that run already are attached to."""
        for executor in self.executors.values():
            executor.prepare(self.home)
        self._thread = threading.Thread(target=self._work, name="controller", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread. Running jobs continue; the next server attaches to them."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._hub.close()
        self._index.close()
        os.close(self._server)

    def subscribe(self, notify: Callable[[], object] | None = None) -> Subscription:
        """Changes of all jobs from now on; `notify` is called from another thread when one is waiting."""
        return self._hub.subscribe(notify)

    def round(self) -> None:
        """One look at all jobs that run, then the start of those that can."""
        if self._stale:
            self._reopen()
        for name, executor in self.executors.items():
            executor.look()
            for id in sorted({job.id for job in self._active(name)} | executor.living()):
                self._tend(id, executor)
            self._schedule(name, executor)

    def _work(self) -> None:
        while not self._closing:
            self._wake.clear()
            try:
                self.round()
            except Exception as error:
                # The folders remain the truth: the index is opened and filled again.
                self._stale = True
                if not isinstance(error, DatabaseError | UserError | OSError):
                    traceback.print_exc()
                _warn(f"the index or a folder cannot be used, trying again: {error}")
            self._wake.wait(self._poll)

    def _tend(self, id: str, executor: Executor) -> None:
        with contextlib.suppress(KeyError):  # it was removed in the meantime
            job = self.store.get(id)
            message = ""
            try:
                if job.state in ACTIVE or executor.held(job):
                    message = executor.tend(job)
            except OSError as error:
                message = f"{error.filename or 'the job folder'}: {error.strerror}; trying again"
            with self._lock:
                self._refresh(id, message)

    def _active(self, executor: str) -> builtins.list[Job]:
        """The jobs that an executor has to look after, oldest first."""
        jobs = {job.id: job for job in self._index.active(executor)} | self._unwritten
        return [jobs[id] for id in sorted(jobs) if jobs[id].executor == executor and jobs[id].state in ACTIVE]

    def _schedule(self, name: str, executor: Executor) -> None:
        active = self._active(name)
        for job in self._index.waiting(name, STARTS):
            if self._closing or not self._may_start(job, executor):
                continue
            if not executor.has_room(job, active):
                return  # those after it wait too: otherwise a large job would wait forever
            with self._lock, contextlib.suppress(KeyError):
                if self._view(self.store.get(job.id)).state in WAITING:
                    self.store.begin(job.id)
                    active.append(job)
            self._tend(job.id, executor)

    def _may_start(self, job: Job, executor: Executor) -> bool:
        if executor.problem(job.spec) or executor.held(job):
            return False
        if job.state != "requeued" or not job.ended:
            return True
        return seconds_since(job.ended) >= min(self._retry_delay * 2 ** min(job.attempt - 1, 20), LONGEST_DELAY)

    def _view(self, job: Job) -> Job:
        """The job as users see it: an attempt that Slurm may start again has not ended, whatever its files say."""
        executor = self.executors.get(job.executor)
        held = executor.held(job) if executor is not None else None
        if held and job.state != held and job.state in ("running", "requeued", "failed", "lost"):
            return replace(job, state=held, ended=None, message="Slurm has not released the job yet")
        return job

    def _refresh(self, id: str, message: str = "") -> Job:
        """Writes the row of a job from its folder. The lock must be held."""
        try:
            job = self._view(self.store.get(id))
        except KeyError:
            self._forget(id)
            raise
        if job.state in ACTIVE and (message or job.message):
            job = replace(job, message=message or job.message)
        elif job.state in WAITING and job.executor in self.executors:
            job = replace(job, message=self.executors[job.executor].problem(job.spec) or job.message)
        return self._record(job)

    def _record(self, job: Job) -> Job:
        try:
            before = self.get(job.id)
        except KeyError:
            before = None
        except DatabaseError:
            before, self._stale = None, True
        if before != job:
            self._unwritten[job.id] = job
            with self._or_later():  # the request itself has succeeded, since its file is written
                self._index.put([job])
                del self._unwritten[job.id]
            self._hub.publish(job)
        return job

    def _forget(self, id: str) -> None:
        """Deletes the row of a job that has no folder any more. The lock must be held."""
        self._unwritten.pop(id, None)
        with self._or_later():
            self._index.delete(id)

    def _reopen(self) -> None:
        """Opens the index again, and fills it."""
        with self._lock, self._or_later():
            fresh = Index(self.home, self._database)
            self._index.close()
            self._index = fresh
            self._synchronise()

    @contextlib.contextmanager
    def _or_later(self) -> Iterator[None]:
        """What cannot be written to the index, as on a full disk, is written as soon as it can be."""
        try:
            yield
        except (DatabaseError, UserError) as error:
            self._stale = True
            _warn(f"the index cannot be written, trying again: {error}")

    def _synchronise(self) -> None:
        """Fills the index from the folders."""
        self._index.replace([self._view(job) for job in self.store.all()])
        self._unwritten.clear()
        self._stale = False


def _only_server(home: Path) -> int:
    """Locks the home folder; the lock ends with this process."""
    handle = os.open(home / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"{home}: another server uses this folder", remedy="stop it, or choose another folder"
        ) from None
    return handle


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
