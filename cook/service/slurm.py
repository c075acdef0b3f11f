"""The executor for Slurm: `sbatch`, `squeue --json` and `scancel`, by lists of arguments, each with a time limit.

The job name `cook-ID-N` identifies an attempt. It is looked up before any submission, so that an `sbatch` that was cut
short after it had succeeded is adopted and not repeated. Two Slurm jobs of one attempt, should they ever exist, are
harmless: only one supervisor can create `process.json`, and the other ends at once.

A controller of Slurm that does not answer says nothing about the jobs. They keep their state.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cook.base.files import write_json
from cook.service.environment import base_environment
from cook.service.executors import OVERDUE, SILENCE, SUPERVISOR, Held
from cook.service.jobs import Job, Request, declare_end, grace_of, now, read, seconds_since, stop_wanted

PREFIX = "cook"
TIMEOUT = 30.0  # seconds for one command
LATE_SUBMISSION = 60.0  # seconds in which an sbatch that was cut short may still appear in the queue
SETTLING = 30.0  # seconds in which the exit.json of a job that Slurm has ended may still appear on a shared file system
OPTIONS = (
    "account",
    "constraint",
    "cpus_per_task",
    "exclude",
    "gres",
    "mem",
    "nodelist",
    "partition",
    "qos",
    "reservation",
    "time",
)
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
"""Final states. PREEMPTED is none of them: Slurm may put the job back into its queue."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A line of `squeue`."""

    number: int
    name: str
    state: str
    reason: str

    @property
    def is_live(self) -> bool:
        return self.state not in ENDED


class SlurmExecutor:
    """Runs jobs under Slurm.

    Args:
        supervisor: The command that supervises an attempt; the job's folder and the attempt are appended.
        timeout: Seconds for one command of Slurm.
        silence: Seconds after which a job that Slurm no longer knows, without an exit.json, is lost.
        settling: Seconds after which a job that Slurm has ended, without an exit.json, is lost.
    """

    def __init__(
        self,
        supervisor: Sequence[str] = SUPERVISOR,
        timeout: float = TIMEOUT,
        silence: float = SILENCE,
        settling: float = SETTLING,
    ):
        self._supervisor, self._timeout = tuple(supervisor), timeout
        self._silence, self._settling = silence, settling
        self._jobs: list[SlurmJob] | None = None
        self._trouble = "Slurm has not been asked yet"
        self._told: dict[str, tuple[str, str]] = {}  # by name: the request that was passed on, and how
        self._tried: dict[str, float] = {}  # by name: when an sbatch failed or was cut short
        self._refused: dict[str, str] = {}
        self._gone_since: dict[str, float] = {}

    def prepare(self, home: Path) -> None:
        pass

    def problem(self, spec: Mapping[str, Any]) -> str | None:
        options = spec.get("slurm") or {}
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            return f"slurm: unknown options {', '.join(unknown)}; known are {', '.join(OPTIONS)}"
        return None

    def look(self) -> None:
        self._jobs = None
        done = self._run(["squeue", "--me", "--json"])
        if done is None or done.returncode:
            return
        try:
            answer = json.loads(done.stdout)
            # Without its controller, Slurm 22.05 prints an empty list and ends with 0; only `errors` says so.
            if answer.get("errors"):
                self._trouble = f"squeue: {answer['errors'][0].get('description')}: slurmctld does not answer"
            else:
                self._jobs = [job for each in answer["jobs"] if (job := _parse(each))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._trouble = f"squeue --json cannot be read: {error!r}"

    def living(self) -> set[str]:
        return {job.name.split("-")[1] for job in self._jobs or () if job.is_live}

    def held(self, job: Job) -> Held | None:
        live = [each for each in self._known(name_of(job)) if each.is_live]
        if not live:
            return None
        return "starting" if all(each.state == "PENDING" for each in live) else "running"

    def has_room(self, job: Job, active: Sequence[Job]) -> bool:
        return self._jobs is not None

    def tend(self, job: Job) -> str:
        if self._jobs is None:
            return f"the state is unknown: {self._trouble}"
        name = name_of(job)
        found = self._known(name)
        live = [each for each in found if each.is_live]
        if live:
            self._gone_since.pop(name, None)
            return self._follow(job, self._adopt(job, live))
        if (job.attempt_folder / "exit.json").exists():
            return ""
        if found or (job.attempt_folder / "submitted.json").exists() or self._process(job):
            return self._await_end(job, found[-1] if found else None)
        return self._submit(job)

    def _known(self, name: str) -> list[SlurmJob]:
        return sorted((job for job in self._jobs or () if job.name == name), key=lambda job: job.number)

    @staticmethod
    def _process(job: Job) -> dict[str, Any] | None:
        return read(job.attempt_folder / "process.json")

    def _adopt(self, job: Job, live: Sequence[SlurmJob]) -> SlurmJob:
        """The Slurm job of an attempt; others with its name are cancelled."""
        record = read(job.attempt_folder / "submitted.json")
        owner = str((self._process(job) or {}).get("slurm_job") or (record or {}).get("slurm_job"))
        chosen = next((each for each in live if str(each.number) == owner), live[0])
        for other in live:
            if other is not chosen:
                self._run(["scancel", str(other.number)])
        if record is None:
            self._write_number(job, chosen.number)
        return chosen

    @staticmethod
    def _write_number(job: Job, number: int) -> None:
        write_json(job.attempt_folder / "submitted.json", {"slurm_job": str(number), "at": now()})

    def _follow(self, job: Job, slurm: SlurmJob) -> str:
        wanted = stop_wanted(job.folder, job.attempt)
        if wanted:
            self._stop(job, slurm, wanted)
        if slurm.state == "PENDING":
            return f"in Slurm's queue as job {slurm.number} ({slurm.reason})"
        if slurm.state == "RUNNING":
            return f"Slurm job {slurm.number}" if job.state == "running" else job.message
        return f"Slurm job {slurm.number} is {slurm.state}"

    def _stop(self, job: Job, slurm: SlurmJob, wanted: Request) -> None:
        told, at = (wanted, slurm.state), (read(job.folder / "wanted.json") or {}).get("at") or now()
        if slurm.state == "PENDING":
            # A pending job cannot be signalled. If it starts meanwhile, its supervisor reads the request.
            self._run(["scancel", "--state=PENDING", str(slurm.number)])
        elif seconds_since(at) > grace_of(wanted, job) + OVERDUE:
            self._run(["scancel", str(slurm.number)])
        elif self._told.get(job.id) != told and slurm.state == "RUNNING":
            # Without --full the batch step, which the supervisor is, gets no signal.
            if self._run(["scancel", "--signal=TERM", "--full", str(slurm.number)]) is not None:
                self._told[job.id] = told

    def _await_end(self, job: Job, ended: SlurmJob | None) -> str:
        """An attempt that Slurm has ended or forgotten: its exit.json decides, and without one, time."""
        name, process = name_of(job), self._process(job)
        if process is None and ended is not None and ended.state == "CANCELLED":
            declare_end(job, f"Slurm job {ended.number} was cancelled before it began", "cancelled")
            return ""
        if process is None and stop_wanted(job.folder, job.attempt):
            declare_end(job, "cancelled before it began", "cancelled")
            return ""
        since = self._gone_since.setdefault(name, time.monotonic())
        patience = self._silence if ended is None else self._settling
        state = f"has ended it as {ended.state}" if ended else "no longer knows it"
        if time.monotonic() - since < patience or self._is_beating(job, patience):
            return f"Slurm {state}; waiting for its exit.json"
        declare_end(job, f"Slurm {state}, and it has left no exit.json")
        return ""

    @staticmethod
    def _is_beating(job: Job, patience: float) -> bool:
        try:
            return time.time() - (job.attempt_folder / "heartbeat").stat().st_mtime < patience
        except OSError:
            return False

    def _submit(self, job: Job) -> str:
        name = name_of(job)
        if stop_wanted(job.folder, job.attempt):
            declare_end(job, "stopped before it was submitted to Slurm", "cancelled")
            return ""
        if time.monotonic() - self._tried.get(name, float("-inf")) < LATE_SUBMISSION:
            return self._refused.get(name, "")
        done = self._run(submission(job, self._supervisor), script(job, self._supervisor))
        if done is not None and done.returncode == 0:
            self._write_number(job, int(done.stdout.strip().split(";")[0]))
            return f"Slurm job {done.stdout.strip()}"
        # It may have succeeded all the same: then it appears under its name.
        self._tried[name] = time.monotonic()
        reason = self._trouble if done is None else done.stderr.strip().splitlines()[-1:]
        self._refused[name] = f"sbatch failed, trying again: {reason if isinstance(reason, str) else ''.join(reason)}"
        return self._refused[name]

    def _run(self, command: Sequence[str], script: str | None = None) -> subprocess.CompletedProcess[str] | None:
        """Runs a command of Slurm; None if it did not answer."""
        try:
            done = subprocess.run(command, input=script or "", capture_output=True, text=True, timeout=self._timeout)
        except subprocess.TimeoutExpired:
            self._trouble = f"{command[0]} has not answered for {self._timeout:.0f} s"
            return None
        except OSError as error:
            self._trouble = f"{command[0]}: {error.strerror}"
            return None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            self._trouble = f"{command[0]}: {lines[-1]}"
        return done


def name_of(job: Job) -> str:
    """The name that Slurm knows an attempt by."""
    return f"{PREFIX}-{job.id}-{job.attempt}"


def submission(job: Job, supervisor: Sequence[str] = SUPERVISOR) -> list[str]:
    """The `sbatch` command of an attempt."""
    options = {str(name).replace("_", "-"): str(value) for name, value in (job.spec.get("slurm") or {}).items()}
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={name_of(job)}",
        "--nodes=1",
        "--ntasks=1",
        f"--chdir={job.folder}",
        f"--output={job.attempt_folder / 'supervisor.log'}",
        "--open-mode=append",
        "--export=NIL",
        "--requeue",
    ]
    if "cpus-per-task" not in options:
        command.append(f"--cpus-per-task={job.processes}")
    if job.gpus and "gres" not in options:
        command.append(f"--gres=gpu:{job.gpus}")
    if "time" in options:  # it saves before the limit, and a retry resumes it
        command.append(f"--signal=B:TERM@{int(min(job.stop_grace, 300))}")
    return [*command, *(f"--{name}={value}" for name, value in options.items())]


def script(job: Job, supervisor: Sequence[str] = SUPERVISOR) -> str:
    """The batch script of an attempt. `exec` makes the supervisor the process that Slurm signals."""
    variables = [f"{name}={value}" for name, value in base_environment().items()]
    command = shlex.join(["env", *variables, *supervisor, str(job.folder), str(job.attempt)])
    return f"#!/bin/sh\nexec {command}\n"


def _parse(line: Mapping[str, Any]) -> SlurmJob | None:
    """A job of this service in the output of `squeue --json`; None for others. Newer versions list several states."""
    name, state = str(line["name"]), line["job_state"]
    if not name.startswith(f"{PREFIX}-") or name.count("-") != 2:
        return None
    state = state if isinstance(state, str) else next(iter(state), "")
    return SlurmJob(number=int(line["job_id"]), name=name, state=state, reason=str(line.get("state_reason", "")))
