"""The lock file that allows one run per folder. It names the processes of the run."""

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
    """Holds `folder/run.lock`. All ranks must enter this context together.

    The lock of a killed run is taken over only if all of its processes are known to have ended: either they ran on the
    machines of this run's ranks and no longer exist, or they belong to an earlier start of the same Slurm job.

    Yields:
        A function that removes this rank from the lock. A rank that ends because another rank is lost calls it, since
        it never leaves this context.

    Raises:
        UserError: on every rank, if another run holds or may hold the folder, or if the folder cannot be written.
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
    """The fate of each process that a lock names. Each rank knows the processes of its own machine."""
    named = [process for process in _processes(held) if process]
    known = distributed.gather([process.fate() for process in named])
    return {
        process: "alive" if "alive" in fates else "dead" if "dead" in fates else "unknown"
        for process, *fates in zip(named, *known, strict=True)
    }


def _acquire(path: Path, owner: dict[str, Any], fates: dict[Process, str]) -> None:
    with _exclusive(path.parent):
        if os.path.lexists(path):
            held = _read(path)
            if not _is_gone(held, owner, fates):
                raise _refusal(path, held, fates)
            path.unlink()
        try:
            _write(path, owner)
        except FileExistsError:  # by a run on another machine, which may not see this flock
            raise _refusal(path, _read(path), fates) from None


def _write(path: Path, owner: dict[str, Any]) -> None:
    # The file must appear complete: a lock whose owner cannot be read could never be proved stale.
    aside = path.with_name(f".{NAME}.tmp")  # overwrites what a run that was killed here has left
    try:
        with open(aside, "w", encoding="utf-8") as file:
            json.dump(owner, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            with open(path, "x", encoding="utf-8") as file:  # a file system without hard links
                json.dump(owner, file)
    finally:
        aside.unlink(missing_ok=True)
    fsync_folder(path.parent)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Excludes other runs on this machine, so that two runs do not take over the same stale lock."""
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
    """Whether the lock belongs to an earlier start of this Slurm job. Slurm restarts a job only after it has ended."""
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
            f"{path.parent}: another run is using this folder",
            got=f"running process {names}",
            remedy="wait for it, stop it, or choose another output_dir",
        )
    return UserError(
        f"{path.parent}: another run may be using this folder",
        got=f"{path} names process {names}, which cannot be checked from here",
        remedy=f"if you are sure that this run has ended: rm '{path}'",
    )


def _release(path: Path) -> None:
    # The user may have removed the lock, and another run may hold the folder now.
    if this_process() in _processes(_read(path)):
        path.unlink(missing_ok=True)


def _withdraw(path: Path) -> None:
    """Removes this rank from the lock. The last rank on its machine removes the file.

    The ranks on other machines may be unreachable forever, and no longer need the lock: a checkpoint is published by
    all ranks together or not at all, and those ranks also end as soon as they notice that this one has ended.
    """
    with contextlib.suppress(OSError), _exclusive(path.parent):
        held, mine = _read(path), this_process()
        if mine in _processes(held):  # otherwise the lock belongs to another run
            others = [process for process in _processes(held) if process and process != mine]
            left = [process for process in others if process.fate() == "alive"]
            path.unlink()
            if left:
                _write(path, {**held, "processes": [process.as_json() for process in left]})


def in_own_folder(folder: Path, action: Callable[[], None]) -> None:
    """Runs `action`, unless another run holds the folder. No run of this machine takes it meanwhile."""
    with _exclusive(folder):
        path = folder / NAME
        if not os.path.lexists(path) or this_process() in _processes(_read(path)):
            action()


def _make_folder(folder: Path) -> list[Path]:
    """Makes a folder and its parents. Returns those that were missing, innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path] | None) -> None:
    """Removes empty folders that were made for the lock, so that a refused run leaves nothing behind."""
    for folder in folders or ():
        with contextlib.suppress(OSError):
            folder.rmdir()
