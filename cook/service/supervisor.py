"""The supervisor of one attempt: `python -m cook.service.supervisor JOBFOLDER N`. All executors use it.

It starts the commands of the attempt, passes stop requests on to the ranks, and ends only when every process that it
has started has ended. Its last act is `exit.json`. It does not need the server, which may end and start meanwhile.

At each point where it can be killed:

- before `process.json`: nothing has happened; the server starts it again;
- later: its child receives SIGTERM from the kernel and saves. The server ends what remains of the attempt, and only
  then writes the `exit.json` itself;
- after `exit.json`: the attempt has ended.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cook.base.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from cook.base.files import write_json
from cook.base.processes import this_process
from cook.service import trees
from cook.service.artifacts import write_manifest
from cook.service.environment import job_environment
from cook.service.jobs import (
    Job,
    attempt_folder,
    grace_of,
    job_of,
    now,
    read,
    reserve,
    stop_wanted,
    write_once,
    write_reserved,
)
from cook.service.outcomes import outcome_of
from cook.service.steps import Step, steps_of

ALREADY = 3  # exit code: another supervisor has this attempt
TURN = 0.5  # seconds between two looks at wanted.json
HEARTBEAT = 5.0  # seconds
LEFTOVER = 10.0  # seconds that processes may live on after a command that succeeded
LONGEST_REASON = 1000  # characters
HEEDED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD}


class Stopped(Exception):
    """A stop was requested before a command began."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a command ended."""

    code: int | None
    outcome: int
    reason: str


class Supervisor:
    """Supervises one attempt.

    Args:
        job: The job.
        number: The number of the attempt.
        steps: The commands to run, one after the other.
    """

    def __init__(self, job: Job, number: int, steps: Sequence[Step]):
        self.job, self.number, self.steps = job, number, steps
        self.folder = attempt_folder(job.folder, number)
        self.run_folder = job.folder / "run"
        self.gpus: list[str] = []
        self._places: list[int] = []
        self._leases: list[int] = []  # descriptors whose locks the child inherits
        self._record: dict[str, Any] = {}
        self._child: int | None = None
        self._step: Step | None = None
        self._code: int | None = None
        self._signalled: set[int] = set()
        self._stopping = False
        self._kill_at = float("inf")
        self._beat_at = 0.0

    def run(self) -> int:
        """Supervises the attempt to its end.

        Returns:
            The exit code: that of the run, or `ALREADY`.
        """
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ALREADY
        self._forget_requeued()
        if (self.folder / "process.json").exists() or (self.folder / "exit.json").exists():
            return ALREADY
        (self.run_folder / "out" / "outcome.json").unlink(missing_ok=True)
        self._release_run()
        if not self._claim():
            return ALREADY
        trees.adopt_orphans()
        try:
            end = self._supervise()
        except Stopped as stop:
            end = End(code=None, outcome=EXIT_INTERRUPTED, reason=str(stop))
        except Exception as error:
            self._end_all()
            end = End(code=None, outcome=EXIT_FAILED, reason=f"the supervisor failed: {type(error).__name__}: {error}")
        ended = {"code": end.code, "outcome": end.outcome, "started": self._record.get("started"), "ended": now()}
        write_reserved(self.folder / "exit.json", {**ended, "reason": end.reason[:LONGEST_REASON]})
        return end.outcome

    def _forget_requeued(self) -> None:
        """Puts aside the files of an earlier start of the same Slurm job, which Slurm has put back into its queue."""
        before = read(self.folder / "process.json")
        restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        if not before or before.get("slurm_job") != os.environ.get("SLURM_JOB_ID", "") or not before["slurm_job"]:
            return
        if int(before.get("restart") or 0) < restart:
            for name in ("exit.json", "process.json"):
                path = self.folder / name
                if path.exists():
                    path.replace(path.with_suffix(f".{before.get('restart') or 0}.json"))

    def _release_run(self) -> None:
        """Removes the run's lock if the attempt before this one was lost.

        The server has made sure that no process of it lives. The trainer itself cannot prove that of another machine,
        or of this one under another name.
        """
        if "lost" in (read(attempt_folder(self.job.folder, self.number - 1) / "exit.json") or {}):
            (self.run_folder / "out" / "run.lock").unlink(missing_ok=True)

    def _claim(self) -> bool:
        self._record = {
            "supervisor": this_process().as_json(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            "gpus": [],
            "port": None,  # the launcher chooses a free one
            "claimed": now(),
            "started": None,
        }
        # Also on a shared file system without locks, only one process can create this file.
        return write_once(self.folder / "process.json", self._record)

    def _supervise(self) -> End:
        reserve(self.folder / "exit.json")
        self._turn(0)
        if self.job.executor == "local" and self.job.gpus:
            self._lease()
        self._note(gpus=self.gpus, started=now(), message="")
        failures, end = [], End(code=None, outcome=EXIT_FAILED, reason="there is nothing to run")
        for step in self.steps:
            end = self._run(step)
            if end.outcome == EXIT_OK:
                continue
            if step.needed or self._stopping:
                where = "" if step is self.steps[0] else f"{step.name}: "
                return End(code=end.code, outcome=end.outcome, reason=f"{where}{end.reason}")
            failures.append(f"{step.name} failed: {end.reason}")
        write_manifest(self.job.folder, lambda: self._turn(0))
        return End(code=0, outcome=EXIT_OK, reason="; ".join(failures) or "finished")

    def _lease(self) -> None:
        """Locks free GPUs of this machine. The locks end with the last process that has inherited them."""
        folder = self.job.folder.parent.parent / "leases"
        while True:
            for place, uuid in enumerate((read(folder / "gpus.json") or {}).get("gpus", [])):
                handle = os.open(folder / uuid, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(handle)
                    continue
                self.gpus.append(uuid)
                self._places.append(place)
                self._leases.append(handle)
                if len(self.gpus) == self.job.gpus:
                    return
            self.gpus, self._places = [], []
            while self._leases:  # holding some while waiting for others could wait forever
                os.close(self._leases.pop())
            self._note(message=f"waiting for {self.job.gpus} free GPUs")
            self._turn(TURN)
            if self._stopping:
                raise Stopped("stopped while it waited for GPUs")

    def _note(self, **values: Any) -> None:
        self._record |= values
        write_json(self.folder / "process.json", self._record)

    def _run(self, step: Step) -> End:
        if self._stopping:
            raise Stopped(f"stopped before the command {step.name!r}")
        self._code, self._signalled = None, set()
        error_folder = self.folder / "ranks"
        with open(self.folder / "output.log", "ab") as log:
            log.write(f"--- {step.name} ({now()})\n".encode())
            log.flush()
            child = subprocess.Popen(
                step.arguments(error_folder),
                cwd=self.run_folder,
                env=job_environment(self.job.spec, self.number, self._places),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self._leases,
                preexec_fn=trees.ends_with_parent(signal.SIGTERM),
            )
        self._step = step
        self._child, leftover_at = child.pid, float("inf")
        while self._turn(TURN):
            if self._code is not None and leftover_at == float("inf") and not self._stopping:
                # The command has ended and some of its processes have not: ranks without a launcher, or helpers.
                leftover_at = time.monotonic() + (LEFTOVER if self._code == 0 else self.job.stop_grace)
                trees.send(trees.descendants(os.getpid()), signal.SIGTERM)
            if time.monotonic() > leftover_at:
                trees.send(trees.descendants(os.getpid()), signal.SIGKILL)
        child.returncode = self._code  # it is reaped: its destructor has nothing to wait for
        self._child = None
        code, reason = outcome_of(self._code, self.run_folder if step.trains else None, self.folder, self._stopping)
        return End(code=self._code, outcome=code, reason=reason)

    def _turn(self, seconds: float) -> bool:
        """Waits for a signal, at most some seconds, and does all that is due. Returns whether any child lives."""
        received = signal.sigtimedwait(HEEDED, seconds)
        while received is not None:
            if received.si_signo == signal.SIGUSR1:
                trees.send((pid for pid in self._targets() if trees.handles(pid, signal.SIGUSR1)), signal.SIGUSR1)
            elif received.si_signo in (signal.SIGTERM, signal.SIGINT):
                self._stop(self.job.stop_grace)
            received = signal.sigtimedwait(HEEDED, 0)
        wanted = stop_wanted(self.job.folder, self.number)
        if wanted:
            self._stop(grace_of(wanted, self.job))
        if self._stopping and self._child is not None:
            fresh = [pid for pid in self._targets() if pid not in self._signalled]
            self._signalled.update(fresh)
            trees.send(fresh, signal.SIGTERM)
            if time.monotonic() > self._kill_at:
                trees.send(trees.descendants(os.getpid()), signal.SIGKILL)
        self._beat()
        return self._reap()

    def _stop(self, grace: float) -> None:
        # A later request may shorten the time, never lengthen it.
        self._kill_at = min(self._kill_at, time.monotonic() + grace) if self._stopping else time.monotonic() + grace
        self._stopping = True

    def _targets(self) -> list[int]:
        """The ranks. A launcher that gets SIGTERM would kill them before they have saved."""
        if self._child is None or self._code is not None:
            return trees.descendants(os.getpid())
        launched = trees.ranks(os.getpid()) if self._step and self._step.launches else []
        return launched or [self._child]

    def _reap(self) -> bool:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._child:
                self._code = os.waitstatus_to_exitcode(status)

    def _beat(self) -> None:
        if time.monotonic() >= self._beat_at:
            self._beat_at = time.monotonic() + HEARTBEAT
            try:
                (self.folder / "heartbeat").write_text(f"{now()}\n")
            except OSError as error:  # a full disk is no reason to end the run
                print(f"heartbeat: {error}", file=sys.stderr, flush=True)

    def _end_all(self) -> None:
        while self._reap():
            trees.send(trees.descendants(os.getpid()), signal.SIGKILL)
            time.sleep(0.05)


def supervise(folder: Path, number: int, steps: Callable[[Job], Sequence[Step]] = steps_of) -> int:
    """Supervises attempt `number` of the job in `folder`.

    Args:
        folder: The job's folder.
        number: The attempt.
        steps: Makes the commands of a job.

    Returns:
        The exit code for this process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)
    job = job_of(folder)
    return Supervisor(job, number, steps(job)).run()


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]), int(sys.argv[2])))
