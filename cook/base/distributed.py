"""Rank, world size and the few collectives that the house needs; all work in a single process too."""

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
    """The number of ranks that the launcher announced, before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """The rank that the launcher announced, before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its node, as the launcher says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def say(text: str) -> None:
    """Prints on the first rank. An output that takes nothing, a full disk perhaps, ends no run."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            print(text, flush=True)


def warn(text: str) -> None:
    """Prints to standard error on the first rank, as `say` does to standard output."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            print(f"warning: {text}", file=sys.stderr, flush=True)


def loopback() -> str:
    """The name of this machine's loopback interface; empty if it has none."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")


def free_port() -> int:
    """A port of the loopback interface on which nothing listens now."""
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
    """The `source` rank's `value`, a small picklable object, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def gather(value: Any, group: Any = None) -> list[Any]:
    """Every rank's `value`, a small picklable object, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value, group=group)
    return box


def side_group(timeout: timedelta) -> Any:
    """A second group of all ranks, for collectives in a thread beside the training; None on a single rank."""
    return dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None


def leave_group(group: Any) -> None:
    """Frees what `side_group` made; all ranks call it together.

    `new_group` returns on a rank whose own connections stand. To free them at once ends a rank that still connects.
    """
    if group is not None and is_on():
        dist.barrier(group)
        dist.destroy_process_group(group)
