"""Messages while DeepSpeed builds a C++ op, and the lock of a build whose process has ended."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cook.base import distributed
from cook.base.errors import UserError

FRESH = 10.0  # seconds within which the process that holds a lock file must be visible
LOCAL_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs")


def announced(jit_load: Callable[..., Any]) -> Callable[..., Any]:
    """`OpBuilder.jit_load` that prints what it builds and does not wait for a process that has ended."""

    def load(builder: Any, verbose: bool = True) -> Any:
        del verbose  # its own output is for developers of the op
        library, start = _library(builder.name), time.monotonic()
        _await_lock(library.parent / "lock", builder.name)
        new = not library.exists()
        if new:
            _say(f"building DeepSpeed's {builder.name} (C++): once per machine, usually one to three minutes")
        try:
            made = jit_load(builder, verbose=False)
        except Exception as error:  # compiler, linker, file system: each has its own class of errors
            raise UserError(
                f"deepspeed.optimizer: DeepSpeed's {builder.name} could not be built: {first_line(error)}",
                remedy=f'see {library.parent}, or remove "optimizer": cook then uses AdamW of torch',
            ) from error
        if new:
            _say(f"built {builder.name} in {time.monotonic() - start:.0f} s: {library}")
        return made

    return load


def _await_lock(lock: Path, name: str) -> None:
    """Waits while another process builds the same op; removes the lock of a process that was killed.

    torch keeps its lock file open while it builds, and waits for an existing lock file without a timeout.
    """
    notified = False
    while True:
        handle = os.open(lock.parent, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # two ranks must not both find it and remove each other's new lock
            if not lock.exists():
                return
            holder = _holder(lock)
            is_abandoned = holder is None and time.time() - lock.stat().st_mtime > FRESH
            if is_abandoned and _is_local(lock):
                _say(f"removing {lock}: the process that was building {name} has ended")
                lock.unlink()
                return
            if not notified and is_abandoned:
                _say(f"waiting for {lock}: if no machine builds {name}, remove this file")
            elif not notified and holder is not None:
                _say(f"waiting for process {holder}, which builds {name}")
            notified = notified or is_abandoned or holder is not None
        except FileNotFoundError:
            return
        finally:
            os.close(handle)
        time.sleep(1)


def _holder(lock: Path) -> int | None:
    """The process on this machine that has the file open."""
    real = os.path.realpath(lock)
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(entry) == real:
                return int(entry.parts[2])
        except OSError:
            continue  # the process has ended, or belongs to another user
    return None


def _is_local(path: Path) -> bool:
    """Whether only this machine can open a file there; False if that is unknown."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    kinds = [line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == wanted]
    return bool(kinds) and kinds[0] in LOCAL_FILE_SYSTEMS


def _library(name: str) -> Path:
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(name, False)) / f"{name}.so"


def is_built(name: str) -> bool:
    """Whether `_library` exists, without creating its folder."""
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    roots = [Path(root)] if root else Path(cpp_extension.get_default_build_root()).glob("*")
    return any((folder / name / f"{name}.so").exists() for folder in roots)


def _say(text: str) -> None:
    if distributed.local_rank() == 0:
        print(text, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
