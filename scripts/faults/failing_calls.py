"""Lets system calls that write fail in this process and in nothing else: `open`, `write`, `fsync`, `mkdir`, `rename`.

It works below Python, PyTorch and safetensors alike. A process has it only if it was started with `preloaded()`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("failing_calls.c")


def build(folder: Path) -> Path | None:
    """The library, compiled into `folder`; None where there is no compiler for it."""
    compiler, library = shutil.which("cc"), folder / "failing_calls.so"
    if compiler is None:
        return None
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    return library if subprocess.run(command, capture_output=True).returncode == 0 else None


def preloaded(library: Path) -> dict[str, str]:
    """The variable with which a process must start."""
    return {"LD_PRELOAD": str(library)}


def is_on() -> bool:
    return hasattr(ctypes.CDLL(None), "fault_arm")


def arm(part: str, nth: int, code: int, *, for_good: bool = False) -> None:
    """Lets the nth call on a path with `part` in it fail with an errno, or all from that one on; 0: counts only."""
    ctypes.CDLL(None).fault_arm(os.fsencode(part), ctypes.c_long(nth), code, int(for_good))


def disarm() -> int:
    """Lets all calls work again; returns how many were counted."""
    return int(ctypes.CDLL(None).fault_disarm())
