"""Which process is meant, and whether it is still there: a number alone says little, numbers are used again."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

PROC = Path("/proc")
LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""Variables that torchrun's and DeepSpeed's ranks find set."""
ADOPTERS = ("systemd", "init", "tini", "dumb-init", "docker-init")
"""Who takes on the processes that a launcher leaves behind, beside process 1."""
SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "csh", "tcsh")


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


def launchers() -> list[Process] | None:
    """The processes whose end means the end of this rank; empty where no launcher is known, None if it has gone.

    That is the nearest ancestor that can be torchrun or DeepSpeed's, else the parent unless it is a shell: a run that
    was started by hand in the background outlives the shell.
    """
    ancestors = _ancestors()
    if any(name in os.environ for name in LAUNCHED):
        found = next((pid for pid in ancestors if _is_python(pid)), None)
        if found is None and ancestors[-1] == 1:  # adopted
            return None
        found = found or ancestors[0]
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and ancestors[0] > 1 and _name(ancestors[0]) not in SHELLS:
        found = ancestors[0]
    else:
        return []
    watched = [found]
    if "deepspeed.launcher.launch" in _command(found):
        # `deepspeed` on one machine does not pass SIGTERM on to the process that starts the ranks: it just ends. On
        # several, what starts the ranks is the shell of an ssh connection, and outlives it.
        above = ancestors[ancestors.index(found) + 1 :]
        if os.environ.get("CROSS_SIZE") == "1" and above and (above[0] == 1 or _name(above[0]) in ADOPTERS):
            return None
        while above and above[0] > 1 and ("deepspeed" in _command(above[0]) or _name(above[0]).startswith("sshd")):
            watched.append(above.pop(0))
    return [_process(pid) for pid in watched]


def _ancestors() -> list[int]:
    """Parent, its parent and so on, as far as the system tells; at least the parent."""
    found = [os.getppid()]
    while (above := _stat(found[-1])[2]) > 0:
        found.append(above)
    return found


def _is_python(pid: int) -> bool:
    try:
        return "python" in os.path.basename(os.readlink(PROC / str(pid) / "exe"))
    except OSError:  # another user's
        return "python" in _command(pid)


def _name(pid: int) -> str:
    try:
        return (PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return ""


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
