"""The peak memory of a piece of work, on a GPU or in this process."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): resets the peak resident set size to the current one


class PeakMemory:
    """A context that measures the peak memory inside it, minus the memory at its start.

    On a GPU: bytes of tensors, from PyTorch's allocator. On a CPU: the process's resident memory, from
    Linux.
    """

    bytes: int | None = None
    """Bytes; set when the context ends; None if the system does not report it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = _start_of_resident()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _status("VmHWM")
        self.bytes = max(0, peak - self._before)


def _start_of_resident() -> int | None:
    try:
        # Memory that was freed before and kept by the C library would hide as much of the new memory.
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library: the result may be too low after earlier work in the same process
    try:
        CLEAR.write_text(RESET_PEAK)
        return _status("VmRSS")
    except (OSError, StopIteration):
        return None  # not Linux, or a sandbox without /proc


def _status(field: str) -> int:
    """A size from this process's status, in bytes."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
