"""The accelerator of this process, of whichever kind, or the CPU. No other module names a kind of accelerator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import torch

CPU = torch.device("cpu")
CGROUP = Path("/sys/fs/cgroup")
UNUSED = ("mps",)
"""Accelerators that have no collectives, so that DeepSpeed cannot train on them."""


def accelerator() -> torch.device | None:
    """The kind of accelerator that torch and DeepSpeed both use, without an index; None: there is none.

    `DS_ACCELERATOR=cpu`, DeepSpeed's own variable, leaves accelerators unused.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type in UNUSED or os.environ.get("DS_ACCELERATOR") == "cpu":
        return None
    return torch.device(found.type)


def accelerators() -> int:
    """The number of accelerators that this process sees."""
    return torch.accelerator.device_count() if accelerator() else 0


def default_device() -> torch.device:
    """The present accelerator, or the CPU."""
    return accelerator() or CPU


def device_of_rank(local_rank: int) -> torch.device:
    """Makes the accelerator with the number `local_rank` the present one, and returns it; the CPU if there is none."""
    kind = accelerator()
    if kind is None:
        return CPU
    torch.accelerator.set_device_index(local_rank)
    return torch.device(kind.type, local_rank)


def collectives() -> str:
    """The backend of `torch.distributed` for the default device: gloo, nccl, xccl, hccl and so on."""
    return torch.distributed.get_default_backend_for_device(default_device())


def has_fast_bf16() -> bool:
    """Whether the default device computes in bf16 at least as fast as in fp32."""
    kind = accelerator()
    if kind is not None:
        supported = getattr(torch.get_device_module(kind), "is_bf16_supported", None)
        return bool(supported is not None and supported())
    return cpu_has_fast_bf16()


def cpu_has_fast_bf16() -> bool:
    """Whether the CPU has bf16 instructions; without them it computes several times more slowly than in fp32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def wait_for(device: torch.device) -> None:
    """Waits until the device has computed everything; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device; for a CPU: on the host, or in the container's limit."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    free, limit, used = psutil.virtual_memory().available, Path("memory.max"), Path("memory.current")
    try:
        free = min(free, int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text()))
    except (OSError, ValueError):  # no control group, or "max": no limit
        pass
    return max(0, free)


def random_state() -> dict[str, torch.Tensor]:
    """The state of the accelerator's generator by its kind; empty without one."""
    kind = accelerator()
    return {} if kind is None else {kind.type: torch.get_device_module(kind).get_rng_state()}


def restore_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned; the state of another kind of accelerator is left out."""
    kind = accelerator()
    if kind is not None and kind.type in state:
        torch.get_device_module(kind).set_rng_state(state[kind.type])


def cuda_capability() -> tuple[int, int] | None:
    """The CUDA compute capability of the present accelerator; None for other kinds, or without one."""
    device = accelerator()
    if device is None or device.type != "cuda":
        return None
    major, minor = torch.get_device_module(device).get_device_capability()
    return major, minor


def card() -> str | None:
    """The name of the accelerator; None without one."""
    kind = accelerator()
    return None if kind is None else str(torch.get_device_module(kind).get_device_name())
