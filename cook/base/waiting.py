"""How OpenMP's threads wait for one another: chosen before torch is imported, because OpenMP reads it only once.

By default they spin. On a quiet machine this is the fastest way. Beside another busy process it is the slowest, since
threads spin on cores that the others need (`scripts/bench/omp_waiting.py`).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # a user who sets one of these has chosen
BUSY = 0.15  # share of the machine's cores that other processes must use for threads to wait passively
SECONDS = 0.3  # duration of the measurement


def choose_waiting() -> str | None:
    """Sets `OMP_WAIT_POLICY=PASSIVE` if other processes are using the cores, unless the user has set how to wait.

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
    """The share of the machine's CPU time that processes outside this run use, measured for some seconds.

    The processes of this run are those of this process group: a launcher and all ranks that it started.
    """
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
