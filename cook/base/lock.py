"""One run a folder: a lock file that names the processes of the run, and outlives them only if they were killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cook.base import distributed
from cook.base.errors import UserError
from cook.base.files import fsync_folder, read_json
from cook.base.processes import Process, this_process

NAME = "run.lock"


@contextlib.contextmanager
def run_lock(folder: str | Path) -> Iterator[Callable[[], None]]:
    """Holds `folder/run.lock` while it is entered; all ranks enter it together.

    The lock of a run that was killed is taken over only with proof that none of its processes is left: all of them ran
    on the machines of this run's ranks and are gone, or they were an earlier start of the same Slurm job.

    Yields:
        What a rank calls that ends because another one is lost, and so without leaving this context.

    Raises:
        UserError: on every rank, if another run holds the folder, or may still hold it, or it cannot be written.
    """
    path = Path(folder) / NAME
    owner = _owner(distributed.gather(this_process()))
    fates = _fates(distributed.broadcast(_read(path) if distributed.rank() == 0 else None))
    refusal, made = None, None
    if distributed.rank() == 0:
        try:
            made = _make_folder(Path(folder))
            _acquire(path, owner, fates)
        except UserError as error:
            refusal = error
        except OSError as error:
            refusal = UserError(f"{folder}: cannot be written: {error.strerror}", remedy="choose another output_dir")
        if refusal is not None:
            _remove_empty(made)
    refusal = distributed.broadcast(refusal)
    if refusal is not None:
        raise refusal
    try:
        yield lambda: _withdraw(path)
    finally:
        if distributed.rank() == 0:
            _release(path)
            _remove_empty(made)


def _owner(processes: list[Process]) -> dict[str, Any]:
    slurm = {name: os.environ.get(f"SLURM_{name}", "") for name in ("CLUSTER_NAME", "JOB_ID", "RESTART_COUNT")}
    return {"processes": [process.as_json() for process in processes], "slurm": slurm}


def _processes(held: Any) -> list[Process | None]:
    listed = held.get("processes") if isinstance(held, dict) else None
    return [Process.from_json(entry) for entry in listed] if isinstance(listed, list) else []


def _fates(held: Any) -> dict[Process, str]:
    """What became of the processes that a lock names; each rank knows those of its own machine."""
    named = [process for process in _processes(held) if process]
    known = distributed.gather([process.fate() for process in named])
    return {
        process: "alive" if "alive" in fates else "dead" if "dead" in fates else "unknown"
        for process, *fates in zip(named, *known, strict=True)
    }


def _acquire(path: Path, owner: dict[str, Any], fates: dict[Process, str]) -> None:
    with _alone(path.parent):
        if os.path.lexists(path):
            held = _read(path)
            if not _is_gone(held, owner, fates):
                raise _refusal(path, held, fates)
            path.unlink()
        try:
            _write(path, owner)
        except FileExistsError:  # a run on another machine, where this one's flock may not be seen
            raise _refusal(path, _read(path), fates) from None


def _write(path: Path, owner: dict[str, Any]) -> None:
    # The file appears whole: a lock without a readable owner could never be proved stale.
    aside = path.with_name(f".{NAME}.tmp")  # of a run that was killed here, it is simply written over
    try:
        with open(aside, "w", encoding="utf-8") as file:
            json.dump(owner, file)
            file.flush()
            os.fsync(file.fileno())
        _place(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_folder(path.parent)


def _place(aside: Path, path: Path) -> None:
    try:
        os.link(aside, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with open(path, "x", encoding="utf-8") as file:  # a file system without hard links
            file.write(aside.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two runs of this machine that find the same stale lock must not both take it over."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except UserError:
        return None


def _is_gone(held: Any, mine: dict[str, Any], fates: dict[Process, str]) -> bool:
    if not isinstance(held, dict):
        return False
    if _is_earlier_start(held.get("slurm"), mine["slurm"]):
        return True
    processes = _processes(held)
    return bool(processes) and all(process is not None and fates.get(process) == "dead" for process in processes)


def _is_earlier_start(held: Any, mine: dict[str, str]) -> bool:
    """Slurm starts a requeued job only after its earlier start has ended, on whatever machines that was."""
    if not isinstance(held, dict) or not mine["JOB_ID"] or held.keys() != mine.keys():
        return False
    same_job = all(held[key] == mine[key] for key in ("CLUSTER_NAME", "JOB_ID"))
    counts = [str(each["RESTART_COUNT"] or "0") for each in (held, mine)]
    return same_job and all(count.isdecimal() for count in counts) and int(counts[0]) < int(counts[1])


def _refusal(path: Path, held: Any, fates: dict[Process, str]) -> UserError:
    processes = [process for process in _processes(held) if process]
    alive = [process for process in processes if "alive" in (fates.get(process), process.fate())]
    names = ", ".join(f"{p.pid} on {p.host}" for p in (alive or processes)[:8]) or "unknown"
    if alive:
        return UserError(
            f"{path.parent}: another run is at work in this folder",
            got=f"process {names}",
            remedy="wait for it, stop it, or choose another output_dir",
        )
    return UserError(
        f"{path.parent}: another run may be at work in this folder",
        got=f"{path} names process {names}, not seen here",
        remedy=f"if you are sure that it has ended: rm '{path}'",
    )


def _release(path: Path) -> None:
    # Someone may have removed it by hand, and another run may have taken the folder since.
    if this_process() in _processes(_read(path)):
        path.unlink(missing_ok=True)


def _withdraw(path: Path) -> None:
    """Takes this rank out of the lock; the last of its machine removes the file.

    The ranks of other machines, which may be out of reach for ever, need no lock any more: a checkpoint is published by
    all ranks together or by none, and they too end as soon as they miss this one.
    """
    with contextlib.suppress(OSError), _alone(path.parent):
        held, mine = _read(path), this_process()
        if mine in _processes(held):  # else another run's
            others = [process for process in _processes(held) if process and process != mine]
            left = [process for process in others if process.fate() == "alive"]
            path.unlink()
            if left:
                _write(path, {**held, "processes": [process.as_json() for process in left]})


def _make_folder(folder: Path) -> list[Path]:
    """Makes a folder; returns those that were missing, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path] | None) -> None:
    """Takes back folders made for the lock alone: what is refused leaves nothing."""
    for folder in folders or ():
        with contextlib.suppress(OSError):
            folder.rmdir()
