"""Trees of processes on Linux: adopting orphans, ending with the parent, finding and signalling descendants."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterable

from cook.base.processes import PROC

MARKER = "COOK_JOB"
"""Environment variable of every process of an attempt: ID/N. It identifies processes whose supervisor was killed."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent ends, so that none can escape.

    Raises:
        OSError: the system has no subreapers.
    """
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def ends_with_parent(number: signal.Signals) -> Callable[[], None]:
    """A `preexec_fn` for a child: it receives the signal when this process ends, and its signals are not blocked."""
    parent = os.getpid()

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        if os.getppid() != parent:  # it has ended before the call
            os._exit(1)

    return prepare


def descendants(pid: int) -> list[int]:
    """The living descendants of a process, parents first."""
    children: dict[int, list[int]] = defaultdict(list)
    for each in processes():
        state, parent = _state_and_parent(each)
        if state not in ("", "Z", "X"):
            children[parent].append(each)
    found, ahead = [], [pid]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def ranks(pid: int) -> list[int]:
    """The ranks that a launcher has started below a process: the topmost processes that have a LOCAL_RANK."""
    below = descendants(pid)
    launched = {each for each in below if "LOCAL_RANK" in environment_of(each)}
    return [each for each in below if each in launched and _state_and_parent(each)[1] not in launched]


def marked(marker: str) -> list[int]:
    """Living processes of this user with this value of the environment variable `MARKER`."""
    return [
        pid
        for pid in processes()
        if environment_of(pid).get(MARKER) == marker and _state_and_parent(pid)[0] not in ("", "Z", "X")
    ]


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal. Without one, SIGUSR1 would end it."""
    for line in _read(pid, "status").splitlines():
        if line.startswith(b"SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Sends a signal to processes; those that have ended are left out."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty if the system does not show it."""
    pairs = (entry.partition("=") for entry in _read(pid, "environ").decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs if name}


def processes() -> list[int]:
    return [int(name) for name in os.listdir(PROC) if name.isdecimal()]


def _state_and_parent(pid: int) -> tuple[str, int]:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return (fields[0].decode(), int(fields[1])) if len(fields) > 1 else ("", 0)


def _read(pid: int, name: str) -> bytes:
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:  # it has ended, or belongs to another user
        return b""
