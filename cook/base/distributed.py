"""Rank, world size and the few collectives that the package needs. All of them also work in a single process."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def is_on() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_on() else 0


def world_size() -> int:
    return dist.get_world_size() if is_on() else 1


def launched_world_size() -> int:
    """Returns the number of ranks that the launcher announced. No process group needs to exist."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Returns the rank that the launcher announced. No process group needs to exist."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Returns the rank of this process on its node, as announced by the launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def say(text: str) -> None:
    """Prints on rank 0. Errors of the output, such as a full disk, are ignored: they must not end a run."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            print(text, flush=True)


def warn(text: str) -> None:
    """Prints a warning to standard error on rank 0. Errors of the output are ignored, as in `say`."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            print(f"warning: {text}", file=sys.stderr, flush=True)


def loopback() -> str:
    """Returns the name of this machine's loopback interface, or an empty string if it has none."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")


def free_port() -> int:
    """Returns a port of the loopback interface that is currently unused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def barrier() -> None:
    if is_on():
        dist.barrier()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sums `values` over the ranks, in place, and returns it."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def broadcast(value: Any, source: int = 0, group: Any = None) -> Any:
    """Returns the `value` of rank `source`, a small picklable object, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def gather(value: Any, group: Any = None) -> list[Any]:
    """Returns the `value` of every rank, a small picklable object, in rank order."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value, group=group)
    return box


def side_group(timeout: timedelta) -> Any:
    """Creates a second group of all ranks, for collectives in a background thread. Returns None on a single rank."""
    return dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None


def leave_group(group: Any) -> None:
    """Frees a group made by `side_group`. All ranks must call it together.

    `new_group` returns as soon as the connections of its own rank exist. Without the barrier, freeing the group would
    crash a rank that is still connecting.
    """
    if group is not None and is_on():
        dist.barrier(group)
        dist.destroy_process_group(group)
