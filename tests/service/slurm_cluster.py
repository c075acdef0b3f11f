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
AuthInfo=socket={folder}/munge.socket,cred_expire=5
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
ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.socket
"""
DAEMON_OF_ACCOUNTING = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
FOR_ACCOUNTING = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db", "mariadb-admin")


def program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))


def missing(*, accounting: bool = False) -> str | None:
    """Why there can be no cluster here."""
    absent = [name for name in PROGRAMS + (FOR_ACCOUNTING if accounting else ()) if program(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return "starting slurmd needs root" if os.getuid() else None


class Cluster:
    """The daemons. `start_controller` and `stop_controller` take slurmctld down and up again.

    Args:
        accounting: Whether slurmdbd keeps the records of jobs, in a MariaDB of its own.
    """

    def __init__(self, *, accounting: bool = False) -> None:
        self.accounting = accounting
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
        places: dict[str, Any] = {name: _free_port() for name in ("ctld_port", "d_port", "dbd_port", "sql_port")}
        places |= {"host": socket.gethostname(), "folder": self.folder}
        self.conf.write_text((CONFIG + (ACCOUNTING if self.accounting else "")).format(**places))
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        paths = [f"--{option}={self.folder / name}" for option, name in {**names, "seed-file": "munge.seed"}.items()]
        try:
            self._start("munged", "--foreground", "--force", "--num-threads=2", *paths)
            _wait(lambda: (self.folder / "munge.socket").exists())
            if self.accounting:
                self._start_accounting(places)
            self.start_controller()
            self._start("slurmd", "-D", "-f", str(self.conf))
            _wait(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T").stdout)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("slurmd", "slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._stop(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf)}

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)

    def _start_accounting(self, places: dict[str, Any]) -> None:
        data = ["--no-defaults", f"--datadir={self.folder / 'sql'}", "--user=root"]
        make = [program("mariadb-install-db"), *data, "--auth-root-authentication-method=normal", "--skip-test-db"]
        subprocess.run([str(word) for word in make], check=True, capture_output=True)
        at = [f"--port={places['sql_port']}", f"--socket={self.folder / 'sql.socket'}"]
        small = ["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=8M", "--skip-name-resolve"]
        self._start("mariadbd", *data, *at, *small, "--bind-address=127.0.0.1")
        _wait(lambda: self.run("mariadb-admin", "--no-defaults", *at, "-h", "127.0.0.1", "ping").returncode == 0)
        conf = self.folder / "slurmdbd.conf"  # found beside slurm.conf
        conf.write_text(DAEMON_OF_ACCOUNTING.format(**places))
        conf.chmod(0o600)
        self._start("slurmdbd", "-D")
        _wait(lambda: self.run("sacctmgr", "--immediate", "add", "cluster", "cook").returncode == 0)

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
