"""The environment of a command: versions of libraries, and how the threads of OpenMP wait for one another."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import time
from pathlib import Path

import psutil

from cook.base.errors import UserError

OLDEST = {
    "torch": ((2, 10), "weights_only loading could run code from a file: CVE-2025-32434, CVE-2026-24747"),
    "deepspeed": ((0, 15, 1), "its launcher allowed command injection: CVE-2024-43497"),
}
"""The oldest versions with which files can be opened safely."""

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # a user who sets one of these has chosen
BUSY = 0.15  # share of the machine's cores that other processes must use for threads to wait passively
SECONDS = 0.3  # duration of the measurement


def check_versions() -> None:
    """Raises a UserError for a library older than in `OLDEST`."""
    for name, (oldest, reason) in OLDEST.items():
        found = importlib.metadata.version(name)
        # Only the numbers before a suffix such as +cu130 or rc1.
        if tuple(map(int, re.findall(r"\d+", re.split(r"[+a-z]", found)[0]))) < oldest:
            wanted, remedy = ".".join(map(str, oldest)) + " or newer", "pip install -r requirements.txt"
            raise UserError(f"{name} is too old: {reason}", wanted=wanted, got=found, remedy=remedy)


def quiet_torchao() -> None:
    """Drops what torchao prints when it is imported, as transformers does where it is installed: that its extensions
    for other GPUs cannot be loaded, and a note to its own authors. Call it before transformers is imported."""
    noise = ("Failed to load", "Skipping import", "%s is an Enum subclass")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).addFilter(lambda record: not str(record.msg).startswith(noise))


def choose_waiting() -> str | None:
    """Sets `OMP_WAIT_POLICY=PASSIVE` if other processes use the cores, unless the user has set how to wait.

    Call it before torch is imported: OpenMP reads the variable once. By default threads spin, which is the fastest way
    on a quiet machine, and the slowest beside another busy process (`scripts/bench/omp_waiting.py`).

    Returns:
        A sentence for the user if it was set. None on a machine with a GPU, with one thread per process, or if the
        system does not provide the numbers.
    """
    if any(name in os.environ for name in SETTINGS) or os.environ.get("OMP_NUM_THREADS") == "1":
        return None
    if any(Path("/dev").glob("nvidia[0-9]*")) or not Path("/proc/stat").exists():
        return None
    share = others_share(SECONDS)
    if share < BUSY:
        return None
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return f"other processes use {share:.0%} of the {psutil.cpu_count()} cores: OpenMP threads wait passively"


def others_share(seconds: float) -> float:
    """The share of the machine's CPU time that processes outside this process group (this run) use, measured."""
    group = os.getpgid(0)
    before, own_before = _used(), _used_by(group)
    started = time.monotonic()
    time.sleep(seconds)
    passed = (time.monotonic() - started) * (psutil.cpu_count() or 1)
    used = _used() - before - max(0.0, _used_by(group) - own_before)
    return min(1.0, max(0.0, used / passed))


def _used() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _used_by(group: int) -> float:
    """CPU seconds of all processes of a process group, and of their children that have ended."""
    total = 0.0
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group:
                total += sum(process.cpu_times()[:4])
        except (psutil.Error, OSError):
            continue  # it has ended
    return total
