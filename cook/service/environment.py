"""The environment of jobs. It is built from known variables: others of the server's shell do not reach a job."""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cook.service.trees import MARKER

PASSED = (
    "CUDA_HOME",
    "GLOO_SOCKET_IFNAME",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "LD_LIBRARY_PATH",
    "NCCL_SOCKET_IFNAME",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TZ",
)
"""Variables of the server that describe the machine and its network, and that jobs need too."""
SLURM = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
"""What the lock of a run needs to know that it is the same Slurm job, started again."""


def base_environment() -> dict[str, str]:
    """The environment of a supervisor, and the first part of that of its job."""
    try:
        user = pwd.getpwuid(os.getuid())
        name, home = user.pw_name, user.pw_dir
    except KeyError:  # a container with a user that has no entry
        name, home = str(os.getuid()), os.environ.get("HOME", "/")
    return {name: os.environ[name] for name in PASSED if name in os.environ} | {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin")),
        "HOME": home,
        "USER": name,
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "PYTHONSAFEPATH": "1",  # a file in the job's folder is never imported in place of a library
        "PYTHONUNBUFFERED": "1",
    }


def job_environment(spec: Mapping[str, Any], attempt: int, gpus: Sequence[int]) -> dict[str, str]:
    """The environment of the processes of an attempt.

    Args:
        spec: The job's spec. Its `environment` is added last.
        attempt: The number of the attempt.
        gpus: The places of its GPUs in the list of `nvidia-smi`. Under Slurm, Slurm chooses them.
    """
    environment = base_environment()
    environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // int(spec.get("processes", 1))))
    environment.setdefault("HF_HOME", str(Path(environment["HOME"]) / ".cache" / "huggingface"))
    # Not UUIDs: DeepSpeed reads numbers here.
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # that of nvidia-smi
    if spec.get("executor") == "slurm":
        environment |= {name: os.environ[name] for name in SLURM if name in os.environ}
        if int(spec.get("gpus", 0)):
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    environment |= {str(name): str(value) for name, value in spec.get("environment", {}).items()}
    return environment | {MARKER: marker(str(spec["id"]), attempt)}


def marker(id: str, attempt: int) -> str:
    return f"{id}/{attempt}"
