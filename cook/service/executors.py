"""Executors: what places the supervisors of attempts, and the one for this machine.

An executor looks after the attempts that the folders call active. Every call may be repeated: after a crash of the
server it is made again, and must not start anything twice.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from cook.base.files import write_json
from cook.base.processes import Process
from cook.service import trees
from cook.service.environment import base_environment, marker
from cook.service.jobs import Job, declare_end, grace_of, now, read, seconds_since, stop_wanted

SUPERVISOR = (sys.executable, "-m", "cook.service.supervisor")
SILENCE = 300.0  # seconds without a heartbeat after which a supervisor that cannot be looked at counts as gone
OVERDUE = 60.0  # seconds that a supervisor may exceed the grace of a stop
RETRY_SPAWN = 2.0  # seconds between two starts of a supervisor that has ended before it began
MAX_SPAWNS = 10
Held = Literal["starting", "running"]


class Executor(Protocol):
    """What the controller needs of an executor."""

    def prepare(self, home: Path) -> None:
        """Called once, by the one server of the home folder."""

    def problem(self, spec: Mapping[str, Any]) -> str | None:
        """Why a job can never run here."""

    def look(self) -> None:
        """Looks at all jobs with one question; called before a round of `tend`."""

    def living(self) -> set[str]:
        """Ids of jobs that are known to live outside this machine, whatever their folders say."""

    def held(self, job: Job) -> Held | None:
        """What the newest attempt does, whatever its files say; None if only they tell."""

    def has_room(self, job: Job, active: Sequence[Job]) -> bool:
        """Whether a waiting job can start beside the active ones."""

    def tend(self, job: Job) -> str:
        """Does what an active job needs: start, stop, notice its end. Returns a message for the user."""


class LocalExecutor:
    """Runs jobs on this machine.

    Args:
        gpus: UUIDs of the GPUs; None: those that `nvidia-smi` lists.
        slots: How many processes of jobs without GPUs run at a time; None: one per core.
        supervisor: The command that supervises an attempt; the job's folder and the attempt are appended.
    """

    def __init__(
        self,
        gpus: Sequence[str] | None = None,
        slots: int | None = None,
        supervisor: Sequence[str] = SUPERVISOR,
    ):
        self.gpus = list(find_gpus() if gpus is None else gpus)
        self.slots = slots or len(os.sched_getaffinity(0))
        self._supervisor = tuple(supervisor)
        self._spawned: dict[tuple[str, int], int] = {}  # process ids, until they are reaped
        self._spawns: dict[tuple[str, int], int] = {}
        self._spawn_at: dict[tuple[str, int], float] = {}
        self._told: dict[tuple[str, int], str] = {}
        self._orphans_since: dict[tuple[str, int], float] = {}

    def prepare(self, home: Path) -> None:
        write_json(home / "leases" / "gpus.json", {"gpus": self.gpus})

    def problem(self, spec: Mapping[str, Any]) -> str | None:
        if int(spec.get("gpus", 0)) > len(self.gpus):
            return f"the job needs {spec['gpus']} GPUs, and this machine has {len(self.gpus)}"
        return None

    def look(self) -> None:
        for key, pid in list(self._spawned.items()):
            try:
                has_ended = os.waitpid(pid, os.WNOHANG)[0] == pid
            except ChildProcessError:
                has_ended = True
            if has_ended:
                del self._spawned[key]

    def living(self) -> set[str]:
        return set()

    def held(self, job: Job) -> Held | None:
        return None

    def has_room(self, job: Job, active: Sequence[Job]) -> bool:
        if job.gpus:
            return sum(other.gpus for other in active) + job.gpus <= len(self.gpus)
        used = sum(other.processes for other in active if not other.gpus)
        return used == 0 or used + job.processes <= self.slots

    def tend(self, job: Job) -> str:
        process = read(job.attempt_folder / "process.json")
        supervisor = Process.from_json((process or {}).get("supervisor"))
        if process is None or supervisor is None:
            return self._spawn(job)
        fate = supervisor.fate()
        if fate == "unknown":  # the machine or its container has started again
            fate = "alive" if _locked(job.attempt_folder / "lock") or _silence(job) < SILENCE else "dead"
        if fate == "dead":
            return self._bury(job)
        return self._stop(job, supervisor) if job.state == "stopping" else str(process.get("message") or "")

    def _spawn(self, job: Job) -> str:
        key = (job.id, job.attempt)
        if key in self._spawned or time.monotonic() < self._spawn_at.get(key, 0):
            return ""
        if self._spawns.get(key, 0) >= MAX_SPAWNS:
            declare_end(job, "its supervisor ended at once, several times; see supervisor.log", "failed")
            return ""
        self._spawns[key] = self._spawns.get(key, 0) + 1
        self._spawn_at[key] = time.monotonic() + RETRY_SPAWN
        arguments = [*self._supervisor, str(job.folder), str(job.attempt)]
        log = str(job.attempt_folder / "supervisor.log")
        self._spawned[key] = os.posix_spawn(
            arguments[0],
            arguments,
            base_environment(),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        return ""

    def _stop(self, job: Job, supervisor: Process) -> str:
        key, wanted = (job.id, job.attempt), read(job.folder / "wanted.json") or {}
        if self._told.get(key) != wanted.get("state"):
            self._told[key] = str(wanted.get("state"))
            trees.send([supervisor.pid], signal.SIGTERM)
        if seconds_since(wanted.get("at") or now()) > job.stop_grace + OVERDUE:
            # The supervisor itself hangs. What it leaves is ended by `_bury`.
            trees.send([supervisor.pid], signal.SIGKILL)
        return job.message

    def _bury(self, job: Job) -> str:
        """Ends what a dead supervisor has left of an attempt, and writes the attempt's end."""
        if (job.attempt_folder / "exit.json").exists():
            return ""
        key = (job.id, job.attempt)
        orphans = trees.marked(marker(job.id, job.attempt))
        if not orphans:
            declare_end(job, "the supervisor of the run was killed, or the machine was started again")
            self._orphans_since.pop(key, None)
            return ""
        grace = grace_of(stop_wanted(job.folder, job.attempt), job)
        if key not in self._orphans_since:
            self._orphans_since[key] = time.monotonic()
            trees.send(orphans, signal.SIGTERM)
        elif time.monotonic() - self._orphans_since[key] > grace:
            trees.send(orphans, signal.SIGKILL)
        return f"the supervisor was killed: waiting for {len(orphans)} processes of the run to save and end"


def find_gpus() -> list[str]:
    """UUIDs of the GPUs of this machine; empty without `nvidia-smi`."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.startswith("GPU-")]


def _locked(path: Path) -> bool:
    """Whether a supervisor holds the lock of an attempt. Not to be called before `process.json` is there."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _silence(job: Job) -> float:
    """Seconds since the last heartbeat of an attempt."""
    for name in ("heartbeat", "process.json"):
        try:
            return time.time() - (job.attempt_folder / name).stat().st_mtime
        except OSError:
            continue
    return float("inf")
