"""Two machines on this one: network namespaces joined by a link, each with a name and an /etc/hosts of its own.

Nothing leaves them: there is no route to anywhere else. They share the disk, as machines of a cluster do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.lossy_link import LossyLink
from tests.recipe.tiny_run import own_environment

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("host-a", "host-b")
REPOSITORY = Path(__file__).resolve().parents[1]
SBIN_PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


def missing() -> str | None:
    """Why there can be no two hosts here; None if there can."""
    if os.geteuid() != 0:
        return "two hosts need root, for network namespaces"
    tools = {"ip": "iproute2", "unshare": "util-linux", "mount": "mount", "hostname": "hostname"}
    if lacking := [package for tool, package in tools.items() if not shutil.which(tool)]:
        return f"two hosts need: apt-get install {' '.join(lacking)}"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return f"no namespaces can be made here: {probe.stderr.strip()}" if probe.returncode else None


class Host:
    """One of them.

    Args:
        number: 0 or 1.
        folder: For its /etc/hosts and what its programs print.
    """

    def __init__(self, number: int, folder: Path):
        self.name, self.address = NAMES[number], ADDRESSES[number]
        self.namespace = f"cook-{os.getpid()}-{number}"
        self.cable = f"veth{number}"
        self.hosts = folder / f"hosts-{number}"
        self.folder = folder
        self.started: list[subprocess.Popen] = []
        # Debian's default: a machine's own name is 127.0.1.1, the others have their addresses.
        others = [f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True) if n != self.name]
        self.hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n{''.join(others)}")

    def start(self, command: Sequence[str], folder: Path, *, ahead: int = 0, **variables: str) -> Program:
        """Starts a program on this machine; its clocks since boot are some seconds ahead of the other's."""
        clocks = ["--time", "--monotonic", str(ahead), "--boottime", str(ahead)] if ahead else []
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", *clocks, "sh", "-c", ENTER, "sh"]
        out = self.folder / f"out-{self.name}-{len(self.started)}"
        with open(out, "wb") as file:
            process = subprocess.Popen(
                [*enter, self.name, str(self.hosts), *command],
                cwd=folder,
                env=own_environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.started.append(process)
        return Program(process, out)

    def pids(self) -> list[int]:
        """What runs on this machine."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def ranks(self, script: str = "train.py") -> list[int]:
        """The processes of a training script, not their launchers."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                arguments = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
                # torchrun and deepspeed name the script, too, after other arguments of their own. A warm interpreter
                # is a program of an interpreter with options.
                if any(a.endswith(script.encode()) for a in arguments[1:5]) and b"-m" not in arguments:
                    found.append(pid)
        return found

    def power_off(self) -> None:
        """Ends all processes at once, and the cable with them: nobody says goodbye."""
        self.cut()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self) -> None:
        """Pulls the cable out: nothing comes, nothing goes, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", self.cable, "down")

    def mend(self) -> None:
        """Puts the cable back."""
        _ip("-n", self.namespace, "link", "set", self.cable, "up")


class Program:
    """A program on one of the machines."""

    def __init__(self, process: subprocess.Popen, out: Path):
        self.process, self.out = process, out

    def printed(self) -> str:
        return self.out.read_text(errors="replace")

    def ended(self, seconds: float) -> int | None:
        """Its exit code, if it ends in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None


class TwoHosts:
    """Both, while it is entered; nothing is left of them afterwards.

    Args:
        folder: As of the hosts.
        is_lossy: Whether the link loses packets, and is late and slow.
    """

    def __init__(self, folder: Path, *, is_lossy: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.hosts = [Host(number, folder) for number in (0, 1)]
        self.is_lossy = is_lossy
        self.link: LossyLink | None = None

    def __enter__(self) -> list[Host]:
        one, other = self.hosts
        for host in self.hosts:
            _ip("netns", "add", host.namespace)
        if self.is_lossy:
            self.link = LossyLink([host.cable for host in self.hosts], [host.namespace for host in self.hosts])
            self.link.start()
        else:
            ends = ("netns", one.namespace, "type", "veth", "peer", "name", other.cable, "netns", other.namespace)
            _ip("link", "add", one.cable, *ends)
        for host in self.hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.cable)
            for link in ("lo", host.cable):
                _ip("-n", host.namespace, "link", "set", link, "up")
        return self.hosts

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            for pid in host.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in host.started:
                process.wait()
        if self.link is not None:
            self.link.close()
        for host in self.hosts:
            _ip("netns", "del", host.namespace)


def cut_in_save(hosts: Sequence[Host]) -> None:
    """Cuts the second host's link during a save of the run `run/`, which is next to the hosts' folder."""
    saves = hosts[0].folder.parent / "run" / "out" / "pretrain" / "checkpoints"
    deadline = time.monotonic() + 60
    while not any(saves.glob("tmp-*")):  # there for a moment
        assert time.monotonic() < deadline, "no save has begun"
    hosts[1].cut()


def torchrun(
    number: int, *options: str, per_node: int = 1, port: int = 29500, launcher: Sequence[str] = ("torchrun",)
) -> list[str]:
    """The command that starts a host's part of a run."""
    return [
        *launcher,
        "--nnodes",
        "2",
        "--nproc_per_node",
        str(per_node),
        "--node_rank",
        str(number),
        "--rdzv_backend",
        "c10d",
        "--rdzv_id",
        "x",
        "--rdzv_endpoint",
        f"{NAMES[0]}:{port}",
        str(REPOSITORY / "cook" / "train.py"),
        "--config",
        "bmcook.json",
        *options,
    ]


def missing_ssh() -> str | None:
    """Why `deepspeed` cannot reach two hosts here; None if it can."""
    lacking = [tool for tool in ("ssh", "sshd", "ssh-keygen", "pdsh") if not shutil.which(tool, path=SBIN_PATH)]
    return f"needs: apt-get install openssh-server pdsh ({', '.join(lacking)} missing)" if lacking else None


def start_ssh(hosts: Sequence[Host], folder: Path) -> dict[str, str]:
    """Starts sshd on every host, with keys of its own. Returns the variables with which `ssh` reaches the hosts."""
    folder.mkdir()
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    for host in hosts:
        config = folder / f"sshd-{host.name}"
        settings = {
            "ListenAddress": host.address,
            "HostKey": folder / "host_key",
            "AuthorizedKeysFile": folder / "key.pub",
            "PidFile": "none",
            "UsePAM": "no",
            "StrictModes": "no",
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
        }
        config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        sshd = shutil.which("sshd", path=SBIN_PATH)
        # sshd wants an empty folder of this name; /run of this machine stays as it is.
        run = f"mount -t tmpfs none /run && mkdir /run/sshd && exec {sshd} -D -e -f {config}"
        host.start(["sh", "-c", run], folder)
    ssh, real = folder / "bin" / "ssh", shutil.which("ssh")
    ssh.parent.mkdir()
    options = (
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "LogLevel=ERROR",
        f"IdentityFile={folder}/key",
    )
    ssh.write_text(f'#!/bin/sh\nexec {real} -F none {" ".join(f"-o {option}" for option in options)} "$@"\n')
    ssh.chmod(0o755)
    return {"PATH": f"{ssh.parent}{os.pathsep}{os.environ['PATH']}"}


def deepspeed(hostfile: Path, *options: str, port: int = 29501) -> list[str]:
    """The command that starts a run on all hosts of a hostfile, from the first one."""
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    launcher = ["deepspeed", "--hostfile", str(hostfile), "--master_addr", ADDRESSES[0], "--master_port", str(port)]
    return [*launcher, str(REPOSITORY / "cook" / "train.py"), "--config", "bmcook.json", *options]


def until(happened: Callable[[], bool], seconds: float) -> bool:
    """Waits until something has happened; says whether it has."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
