"""A Slurm cluster of one node in a folder of its own, for the tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIG = """
ClusterName=cook
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
MinJobAge=2
KillWait=2
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")


def program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))


def missing() -> str | None:
    """Why there can be no cluster here."""
    absent = [name for name in PROGRAMS if program(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return "starting slurmd needs root" if os.getuid() else None


class Cluster:
    """The daemons. `start_controller` and `stop_controller` take slurmctld down and up again."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cook-slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.conf = self.folder / "slurm.conf"
        self._running: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = [_free_port(), _free_port()]
        text = CONFIG.format(host=socket.gethostname(), folder=self.folder, ctld_port=ports[0], d_port=ports[1])
        self.conf.write_text(text)
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        paths = [f"--{option}={self.folder / name}" for option, name in {**names, "seed-file": "munge.seed"}.items()]
        try:
            self._start("munged", "--foreground", "--force", "--num-threads=2", *paths)
            _wait(lambda: (self.folder / "munge.socket").exists())
            self.start_controller()
            self._start("slurmd", "-D", "-f", str(self.conf))
            _wait(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T").stdout)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("slurmd", "slurmctld", "munged"):
            self._stop(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf)}

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)

    def start_controller(self) -> None:
        self._start("slurmctld", "-D", "-f", str(self.conf))
        _wait(lambda: self.run("squeue", "--noheader").returncode == 0)

    def stop_controller(self) -> None:
        self._stop("slurmctld")

    def _start(self, name: str, *options: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as log:
            command: list[Any] = [program(name), *options]
            environment = os.environ | self.environment
            self._running[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def _stop(self, name: str) -> None:
        process = self._running.pop(name, None)
        if process is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "a daemon of Slurm has not come up"
        time.sleep(0.1)
