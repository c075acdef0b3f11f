"""What the tests of the service share: jobs of a stand-in program, and waiting for states."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cook.base.processes import Process
from cook.service.controller import Controller
from cook.service.environment import base_environment
from cook.service.executors import LocalExecutor
from cook.service.jobs import Job, JobStore, read

STAND_IN = Path(__file__).with_name("stand_in.py")
SUPERVISOR = (sys.executable, str(STAND_IN))


def spec(**changes: Any) -> dict[str, Any]:
    """A spec of a local job without GPUs."""
    known = dict(name="a job", owner="somebody", executor="local", gpus=0, processes=1, priority=0, retries=0)
    return {**known, "stop_grace": 20.0, "slurm": {}, "environment": {}, "plan": {}, **changes}


def create(store: JobStore, config: dict[str, Any] | None = None, **changes: Any) -> Job:
    return store.create(spec(**changes), config or {}, {})


def local(**changes: Any) -> LocalExecutor:
    """The executor of this machine with the stand-in in place of the trainer."""
    return LocalExecutor(**{"gpus": (), "slots": 4, "supervisor": SUPERVISOR, **changes})


def controller(home: Path, **changes: Any) -> Controller:
    executors = changes.pop("executors", None) or {"local": local()}
    return Controller(home, executors=executors, poll=0.05, retry_delay=0.0, **changes)


def supervise(job: Job, number: int = 1, **variables: str) -> subprocess.Popen:
    """Starts the supervisor of an attempt."""
    (job.folder / "attempts" / str(number)).mkdir(parents=True, exist_ok=True)
    command = [*SUPERVISOR, str(job.folder), str(number)]
    return subprocess.Popen(command, env=base_environment() | variables, start_new_session=True)


def wait_for(condition: Callable[[], Any], what: object = "", seconds: float = 20.0) -> Any:
    """Waits until a condition holds, and returns what it returned."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.01)
    return found


def wait_state(service: Controller, job: Job, *states: str, seconds: float = 20.0) -> Job:
    """Waits until the index says that a job is in one of these states."""
    wait_for(lambda: service.get(job.id).state in states, lambda: f"{states}, but {service.get(job.id)}", seconds)
    return service.get(job.id)


def ledger(job: Job) -> list[str]:
    path = job.folder / "run" / "ledger"
    return path.read_text().splitlines() if path.exists() else []


def wait_ledger(job: Job, beginning: str = "started") -> None:
    wait_for(lambda: any(line.startswith(beginning) for line in ledger(job)), lambda: f"{beginning!r} in {ledger(job)}")


def exit_of(job: Job, number: int = 1) -> dict[str, Any] | None:
    return read(job.folder / "attempts" / str(number) / "exit.json")


def supervisor_of(job: Job, number: int = 1) -> Process:
    path = job.folder / "attempts" / str(number) / "process.json"
    wait_for(path.exists, "process.json")
    process = Process.from_json((read(path) or {})["supervisor"])
    assert process is not None
    return process


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def fill(path: Path) -> None:
    """Takes all free space of a disk."""
    with open(path, "ab", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
