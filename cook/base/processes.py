"""Identity of processes, and whether they still run. A PID alone is not enough, since PIDs are reused."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

PROC = Path("/proc")
LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")  # variables that torchrun and DeepSpeed set for their ranks
ADOPTERS = ("systemd", "init", "tini", "dumb-init", "docker-init")  # become the parents of orphans, like process 1
SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "csh", "tcsh")


@dataclass(frozen=True, kw_only=True)
class Process:
    """The identity of one process on any machine."""

    host: str
    boot: str  # the machine's boot id and the PID namespace, in which `pid` is valid
    pid: int
    started: str  # start time in clock ticks since boot. Empty if the system does not provide it

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Process | None:
        """The process that `as_json` described, or None for any other value."""
        kinds = {"host": str, "boot": str, "pid": int, "started": str}
        if not isinstance(value, dict) or value.keys() != kinds.keys():
            return None
        if not all(isinstance(value[key], kind) for key, kind in kinds.items()) or value["pid"] <= 0:
            return None
        return cls(**value)

    def fate(self) -> Literal["alive", "dead", "unknown"]:
        """Whether the process still runs. `dead` requires proof: in this boot and namespace it is gone or a zombie."""
        if (self.host, self.boot) != (socket.gethostname(), _boot()):
            return "unknown"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "dead"
        except PermissionError:
            pass  # the process exists and belongs to another user
        except OverflowError:
            return "unknown"
        state, started, _ = _stat(self.pid)
        return "dead" if state in ("Z", "X") or started != self.started else "alive"

    def is_stopped(self) -> bool:
        """Whether the process is on this machine and stopped, as by SIGSTOP."""
        return self.fate() == "alive" and _stat(self.pid)[0] in ("T", "t")


def this_process() -> Process:
    return _process(os.getpid())


def launchers() -> list[Process] | None:
    """The launcher processes: this rank must end when one of them ends. None if the launcher has already ended.

    The launcher is the nearest ancestor that can be torchrun's or DeepSpeed's. If there is none, it is the parent
    process, unless the parent is a shell: a run that was started in the background outlives its shell.
    """
    ancestors = _ancestors()
    if any(name in os.environ for name in LAUNCHED):
        found = None
        for pid in ancestors:
            program = _program(pid)
            if program is None:  # since the ancestors were listed; those above it started it, not this rank
                return None
            if "python" in (program or _command(pid)):
                found = pid
                break
        if found is None and ancestors[-1] == 1:  # adopted
            return None
        found = found or ancestors[0]
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and ancestors[0] > 1 and _name(ancestors[0]) not in SHELLS:
        found = ancestors[0]
    else:
        return []
    watched = [found]
    if "deepspeed.launcher.launch" in _command(found):
        # On one machine, `deepspeed` ends on SIGTERM without passing it on to the process that starts the ranks. On
        # several machines, the shell of an ssh connection starts the ranks, and outlives the connection.
        above = ancestors[ancestors.index(found) + 1 :]
        if os.environ.get("CROSS_SIZE") == "1" and above and (above[0] == 1 or _name(above[0]) in ADOPTERS):
            return None
        while above and above[0] > 1 and ("deepspeed" in _command(above[0]) or _name(above[0]).startswith("sshd")):
            watched.append(above.pop(0))
    return [_process(pid) for pid in watched]


def _ancestors() -> list[int]:
    """The parent process, its parent and so on, as far as the system provides them; at least the parent."""
    found = [os.getppid()]
    while (above := _stat(found[-1])[2]) > 0:
        found.append(above)
    return found


def _program(pid: int) -> str | None:
    """The name of a process's program; empty if this user may not see it, None if the process has ended."""
    try:
        return os.path.basename(os.readlink(PROC / str(pid) / "exe"))
    except FileNotFoundError:
        if _stat(pid)[0]:  # a process without a program: a zombie, or about to become one
            return None
    except OSError:
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


def _name(pid: int) -> str:
    return _read(pid, "comm").strip()


def _process(pid: int) -> Process:
    return Process(host=socket.gethostname(), boot=_boot(), pid=pid, started=_stat(pid)[1])


def _boot() -> str:
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(PROC / 'self/ns/pid')}"
    except OSError:
        return ""  # not Linux: the host name and PID have to be enough


def _stat(pid: int) -> tuple[str, str, int]:
    """State, start time and parent of a process (proc(5), fields 3, 22 and 4); empty and 0 if not available."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (fields[0], fields[19], int(fields[1])) if len(fields) > 19 else ("", "", 0)


def _command(pid: int) -> str:
    return _read(pid, "cmdline").replace("\0", " ")


def _read(pid: int, name: str) -> str:
    try:
        return (PROC / str(pid) / name).read_bytes().decode(errors="replace")
    except OSError:
        return ""
