"""Jobs as folders. The folder is the truth: every state is computed from its files, and every change is one file.

    jobs/ID/spec.json               what was submitted; written once
    jobs/ID/config/                 bmcook.json and l0_pruning.json
    jobs/ID/wanted.json             the newest request: which attempt shall run, or stop
    jobs/ID/attempts/N/             process.json, exit.json, output.log, heartbeat
    jobs/ID/run/                    the working directory of the attempts

A request names the attempt that it is about. So a request survives a crash between its file and its signal, and an old
request never stops a later attempt.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cook.base.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_RANK_LOST, EXIT_USER_ERROR
from cook.base.files import fsync_folder, naming, write_json

State = Literal[
    "queued", "starting", "running", "stopping", "succeeded", "stopped", "failed", "lost", "requeued"
]  # `requeued` waits for an automatic retry
WAITING: tuple[State, ...] = ("queued", "requeued")
ACTIVE: tuple[State, ...] = ("starting", "running", "stopping")
ENDED: tuple[State, ...] = ("succeeded", "stopped", "failed", "lost")

Request = Literal["run", "stop", "stop now"]
ALPHABET = "234567abcdefghijklmnopqrstuvwxyz"  # in the order of ASCII, so that ids sort by time
IDENTIFIER = re.compile(rf"[{ALPHABET}]{{12}}")
EPOCH = 1_700_000_000_000  # milliseconds; 41 bits from here last until 2093
NOW_GRACE = 5.0  # seconds that `stop now` leaves the ranks
RESERVED = 4096  # bytes; JSON may end with blanks
STOP_GRACE = 600.0  # seconds that the ranks have to save, unless the job says otherwise


class Conflict(Exception):
    """The state of a job, or an earlier submission, forbids a request."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as its folder describes it."""

    id: str
    name: str
    state: State
    attempt: int  # the newest attempt; 0 before the first
    created: str  # times are ISO 8601 in UTC
    started: str | None  # of the newest attempt
    ended: str | None
    owner: str
    executor: str
    gpus: int
    processes: int
    priority: int
    message: str
    folder: Path
    spec: dict[str, Any]

    @property
    def stop_grace(self) -> float:
        return float(self.spec.get("stop_grace", STOP_GRACE))

    @property
    def attempt_folder(self) -> Path:
        """The folder of the newest attempt."""
        return attempt_folder(self.folder, self.attempt)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def seconds_since(moment: str) -> float:
    """Seconds that have passed since a time that `now` returned."""
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


def new_id() -> str:
    """Twelve characters: 41 bits of milliseconds, then 19 random bits."""
    number = (time.time_ns() // 1_000_000 - EPOCH) << 19 | secrets.randbits(19)
    return "".join(ALPHABET[number >> shift & 31] for shift in range(55, -1, -5))


def attempt_folder(folder: Path, number: int) -> Path:
    return folder / "attempts" / str(number)


def read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file of the service; None if there is no such file, or it holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_once(path: Path, value: Mapping[str, Any]) -> bool:
    """Writes JSON unless the file exists: of several writers, also on several machines, exactly one gets True.

    Raises:
        OSError: the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        _write(aside, value)
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return True


def reserve(path: Path) -> None:
    """Allocates the space of a small file, so that `write_reserved` succeeds on a disk that is full by then."""
    with naming(path), open(_reserved(path), "wb") as file:
        file.write(b" " * RESERVED)
        file.flush()
        os.fsync(file.fileno())


def write_reserved(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON into the space that was reserved for a file, and gives it its name.

    Raises:
        OSError: the file cannot be written.
    """
    content = json.dumps(value, indent=2, ensure_ascii=False).encode().ljust(RESERVED)
    aside = _reserved(path)
    with naming(path), open(os.open(aside, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    fsync_folder(path.parent)


def _reserved(path: Path) -> Path:
    return path.with_name(f".{path.name}.reserved")


def _write(path: Path, value: Any) -> None:
    with naming(path), open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def last_attempt(folder: Path) -> int:
    """The number of the newest attempt; 0 if there is none."""
    try:
        return max((int(name) for name in os.listdir(folder / "attempts") if name.isdecimal()), default=0)
    except FileNotFoundError:
        return 0


def stop_wanted(folder: Path, attempt: int) -> Request | None:
    """The stop that was requested of an attempt, if any."""
    wanted = read(folder / "wanted.json") or {}
    return wanted["state"] if wanted.get("attempt") == attempt and wanted.get("state") != "run" else None


def grace_of(request: Request | None, job: Job) -> float:
    """Seconds that the ranks have after a request to stop."""
    return min(NOW_GRACE, job.stop_grace) if request == "stop now" else job.stop_grace


def read_outcome(run: Path) -> dict[str, Any] | None:
    """What rank 0 of the trainer wrote when it ended; None if it wrote nothing."""
    return read(run / "out" / "outcome.json")


def job_of(folder: Path) -> Job:
    """The job in a folder.

    Raises:
        KeyError: there is no such folder.
    """
    spec = read(folder / "spec.json")
    if spec is None:
        if not folder.is_dir():
            raise KeyError(folder.name)
        # It must stay visible, since its run may hold weeks of work.
        spec = {"name": "?", "unreadable": True}
    attempt = last_attempt(folder)
    last = attempt_folder(folder, attempt)
    process, end = (read(last / "process.json"), read(last / "exit.json")) if attempt else (None, None)
    state, message = _state(folder, spec, attempt, process, end)
    return Job(
        id=folder.name,
        name=str(spec.get("name") or folder.name),
        state=state,
        attempt=attempt,
        created=str(spec.get("created", "")),
        started=(end or {}).get("started") or (process or {}).get("started"),
        ended=(end or {}).get("ended") if state in (*ENDED, "requeued") else None,
        owner=str(spec.get("owner", "")),
        executor=str(spec.get("executor", "local")),
        gpus=int(spec.get("gpus", 0)),
        processes=int(spec.get("processes", 1)),
        priority=int(spec.get("priority", 0)),
        message=message,
        folder=folder,
        spec=spec,
    )


def _state(
    folder: Path, spec: dict[str, Any], attempt: int, process: dict[str, Any] | None, end: dict[str, Any] | None
) -> tuple[State, str]:
    if spec.get("unreadable"):
        return "lost", "spec.json cannot be read: restore it from a backup, or remove the job"
    wanted = read(folder / "wanted.json") or {"state": "run", "attempt": 1}
    if wanted.get("state") not in ("run", "stop", "stop now") or not isinstance(wanted.get("attempt"), int):
        wanted = {"state": "run", "attempt": max(1, attempt)}  # damaged: the job must not disappear
    stops = wanted["state"] != "run"
    if (attempt == 0 or end is not None) and wanted["attempt"] > attempt:
        return ("stopped", "stopped while it waited") if stops else ("queued", "")
    asked = stops and wanted["attempt"] == attempt
    if end is not None:
        # Attempts after the one that was requested are automatic retries.
        retries_left = int(spec.get("retries", 0)) - (0 if stops else attempt - wanted["attempt"])
        return _verdict(end, asked=asked, retries_left=retries_left)
    message = str((process or {}).get("message") or "")
    if asked:
        return "stopping", "saving, then stopping" if wanted["state"] == "stop" else "stopping now"
    return ("running" if process and process.get("started") else "starting"), message


def _verdict(end: dict[str, Any], *, asked: bool, retries_left: int) -> tuple[State, str]:
    """The state of a job whose newest attempt has ended."""
    outcome, reason = end.get("outcome"), str(end.get("reason") or "")
    if outcome == EXIT_OK:
        return "succeeded", reason
    if (asked or end.get("cancelled")) and outcome not in (EXIT_FAILED, EXIT_USER_ERROR):
        return "stopped", reason
    if outcome in (EXIT_INTERRUPTED, EXIT_RANK_LOST) or end.get("lost"):
        if retries_left > 0:
            return "requeued", reason
        return ("lost", reason) if end.get("lost") else ("failed", f"{reason}; no retries are left".lstrip("; "))
    return "failed", reason


class JobStore:
    """The folder of all jobs.

    Args:
        home: The home folder of the service; made if it is missing.
    """

    def __init__(self, home: Path):
        self.home = Path(home)
        self.folder = self.home / "jobs"
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(exist_ok=True)

    def create(self, spec: dict[str, Any], config: dict[str, Any], scheme: dict[str, Any]) -> Job:
        """Creates a job. Its folder appears complete, or not at all.

        Args:
            spec: What was submitted; `id` and `created` are set here.
            config: The content of `config/bmcook.json`.
            scheme: The content of `config/l0_pruning.json`.

        Raises:
            OSError: the folder cannot be written. Nothing remains.
        """
        while True:
            identifier = new_id()
            aside = self.folder / f".new-{identifier}"
            try:
                (aside / "config").mkdir(parents=True)
                for name in ("attempts", "run"):
                    (aside / name).mkdir()
                _write(aside / "spec.json", {**spec, "id": identifier, "created": now()})
                _write(aside / "config" / "bmcook.json", config)
                _write(aside / "config" / "l0_pruning.json", scheme)
                fsync_folder(aside / "config")
                fsync_folder(aside)
                aside.rename(self.folder / identifier)
            except FileExistsError:
                continue  # the same id in the same millisecond
            except OSError as error:
                shutil.rmtree(aside, ignore_errors=True)
                if (self.folder / identifier).exists():
                    continue  # rename found a folder that is not empty
                raise error
            fsync_folder(self.folder)
            return self.get(identifier)

    def get(self, id: str) -> Job:
        """Raises KeyError if there is no such job."""
        if not IDENTIFIER.fullmatch(id):
            raise KeyError(id)
        return job_of(self.folder / id)

    def all(self) -> list[Job]:
        """All jobs, oldest first."""
        jobs = []
        for name in sorted(os.listdir(self.folder)):
            if IDENTIFIER.fullmatch(name):
                with contextlib.suppress(KeyError):  # removed in the meantime
                    jobs.append(job_of(self.folder / name))
        return jobs

    def attempt_folder(self, id: str, n: int) -> Path:
        return attempt_folder(self.get(id).folder, n)

    def want(self, id: str, state: Request, attempt: int) -> Job:
        """Writes a request for an attempt: the one that runs, or the next one."""
        write_json(self.get(id).folder / "wanted.json", {"state": state, "at": now(), "attempt": attempt})
        return self.get(id)

    def begin(self, id: str) -> Job:
        """Makes the folder of the next attempt. From then on the job is `starting`."""
        job = self.get(id)
        attempt_folder(job.folder, job.attempt + 1).mkdir(parents=True)
        fsync_folder(job.folder / "attempts")
        return self.get(id)

    def remove(self, id: str) -> None:
        """Deletes a job's folder. It disappears at once, also if the deletion is cut short."""
        folder = self.get(id).folder
        aside = folder.with_name(f".removed-{id}")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def clean(self) -> None:
        """Deletes what interrupted creations and removals have left. Only the one running server may call it."""
        for path in (*self.folder.glob(".new-*"), *self.folder.glob(".removed-*")):
            shutil.rmtree(path, ignore_errors=True)


def declare_end(job: Job, reason: str, kind: Literal["lost", "failed", "cancelled"] = "lost") -> bool:
    """Writes the exit.json of an attempt whose supervisor has ended without one.

    Args:
        job: The job. The caller has made sure that no process of its newest attempt lives.
        reason: A sentence for the user.
        kind: `lost` is retried, `failed` is not; `cancelled` is a stop that somebody made elsewhere.

    Returns:
        Whether it was written; False if the supervisor has written one after all.
    """
    process = read(job.attempt_folder / "process.json") or {}
    # The supervisor removes an old outcome.json before it writes process.json.
    told = (read_outcome(job.folder / "run") if process.get("started") else None) or {}
    outcome = told.get("code")
    if outcome == EXIT_OK:
        outcome = None  # the training is complete, and what follows it is not: the next attempt finds it finished
    if outcome is not None:
        reason = f"{told.get('message') or ''} ({reason})".strip()
    record = {"code": None, "outcome": outcome, "started": process.get("started"), "ended": now(), "reason": reason}
    return write_once(job.attempt_folder / "exit.json", {**record, "lost": False, kind: outcome is None})
