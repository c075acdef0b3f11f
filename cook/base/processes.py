"""Which process is meant, and whether it is still there: a number alone says little, numbers are used again."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process, anywhere."""

    host: str
    boot: str
    """The machine's boot and the process namespace: `pid` means something only inside it."""
    pid: int
    started: str
    """When it started, in the clock ticks of its boot; empty where the system does not tell."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Process | None:
        """The process that `as_json` described; None for anything else."""
        kinds = {"host": str, "boot": str, "pid": int, "started": str}
        if not isinstance(value, dict) or value.keys() != kinds.keys():
            return None
        if not all(isinstance(value[key], kind) for key, kind in kinds.items()) or value["pid"] <= 0:
            return None
        return cls(**value)

    def fate(self) -> Literal["alive", "dead", "unknown"]:
        """`dead` only with proof: the same machine, boot and namespace, and no such process there, or a zombie."""
        if (self.host, self.boot) != (socket.gethostname(), _boot()):
            return "unknown"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "dead"
        except PermissionError:
            pass  # there is one, of another user
        except OverflowError:
            return "unknown"
        state, started, _ = _stat(self.pid)
        return "dead" if state in ("Z", "X") or started != self.started else "alive"

    def is_stopped(self) -> bool:
        """Whether it is on this machine and frozen, as by SIGSTOP."""
        return self.fate() == "alive" and _stat(self.pid)[0] in ("T", "t")


def this_process() -> Process:
    """The caller's."""
    return _process(os.getpid())


def launchers() -> list[Process]:
    """The launcher that started this rank: its parent, and for DeepSpeed's, which are two, the one above too."""
    parent = os.getppid()
    found = [_process(parent)]
    # `deepspeed` on one machine does not pass SIGTERM on to the process that starts the ranks: it just ends.
    above = _stat(parent)[2]
    if "deepspeed.launcher.launch" in _command(parent) and "deepspeed" in _command(above):
        found.append(_process(above))
    return found


def _process(pid: int) -> Process:
    return Process(host=socket.gethostname(), boot=_boot(), pid=pid, started=_stat(pid)[1])


def _boot() -> str:
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(PROC / 'self/ns/pid')}"
    except OSError:
        return ""  # no Linux: the host's name and the number must do


def _stat(pid: int) -> tuple[str, str, int]:
    """State, start and parent of a process (proc(5), fields 3, 22, 4); empty and 0 where the system does not tell."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19], int(fields[1])
    except (OSError, IndexError):
        return "", "", 0


def _command(pid: int) -> str:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
