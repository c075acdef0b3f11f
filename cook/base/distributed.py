"""Rank, world size, and the few collectives that the package needs. All of them also work in a single process.

`on_all_ranks` and `on_first_rank` run work of single ranks between two collectives. If it fails on one rank, all ranks
raise the error; otherwise the others would wait in their next collective until a timeout, without knowing why.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cook.base.errors import Interrupted, RunFailed, UserError, machine_trouble, remedy_of

T = TypeVar("T")


def is_on() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_on() else 0


def world_size() -> int:
    return dist.get_world_size() if is_on() else 1


def launched_world_size() -> int:
    """The number of ranks that the launcher announced. No process group needs to exist."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """The rank that the launcher announced. No process group needs to exist."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The rank of this process on its node, as announced by the launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def say(text: str, stream: Any = None) -> None:
    """Prints on rank 0. Errors of the output, such as a full disk, are ignored: they must not end a run."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            print(text, file=stream, flush=True)


def warn(text: str) -> None:
    say(f"warning: {text}", sys.stderr)


def loopback() -> str:
    """The name of this machine's loopback interface, or an empty string if it has none."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")


def free_port() -> int:
    """A port of the loopback interface that is currently unused."""
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


def summed_on_cpu(*parts: torch.Tensor) -> list[torch.Tensor]:
    """The sums of small tensors over the ranks, in fp32 on the CPU: one collective, and one wait for the device."""
    flat = all_reduce_sum(torch.cat([part.detach().float().flatten() for part in parts])).cpu()
    sums = flat.split([part.numel() for part in parts])
    return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]


def _is_alone(group: Any) -> bool:
    """Whether there are no other ranks.

    Raises:
        RuntimeError: there were, in this group, and the main thread has left them: what a background thread would agree
            with itself is not what the ranks have agreed.
    """
    if group is not None and not is_on():
        raise RuntimeError("the ranks have parted")
    return group is None and world_size() == 1


def broadcast(value: Any, source: int = 0, group: Any = None) -> Any:
    """The `value` of rank `source`, a small picklable object, on every rank."""
    if _is_alone(group):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def gather(value: Any, group: Any = None) -> list[Any]:
    """The `value` of every rank, a small picklable object, in rank order."""
    if _is_alone(group):
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value, group=group)
    return box


def side_group(timeout: timedelta) -> Any:
    """A second group of all ranks, for collectives in a background thread; None on a single rank."""
    return dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None


def leave_group(group: Any) -> None:
    """Frees a group made by `side_group`. All ranks must call it together.

    `new_group` returns as soon as the connections of its own rank exist. Without the barrier, freeing the group would
    crash a rank that is still connecting.
    """
    if group is not None and is_on():
        dist.barrier(group)
        dist.destroy_process_group(group)


def on_all_ranks(action: Callable[[], T]) -> T:
    """Runs `action`, without collectives, on every rank. Returns this rank's result when all have finished.

    If it fails on any rank, all ranks raise the error of the first of them.
    """
    result, error = _tried(action)
    _raise_first(gather(_for_all(error)), error)
    assert error is None
    return result  # type: ignore[return-value]


def on_first_rank(action: Callable[[], T]) -> T:
    """Runs `action`, without collectives, on rank 0. All ranks return its small picklable result or raise its error."""
    result, error = _tried(action) if rank() == 0 else (None, None)
    first, result = broadcast((_for_all(error), result))
    _raise_first([first], error)
    return result


def in_words(error: Exception) -> str:
    """The message of an error; for an error caused by the machine, that of `machine_trouble`."""
    trouble = machine_trouble(error)
    return trouble[0] if trouble else str(error) or type(error).__name__


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # all ranks must raise it
        return None, error


def _for_all(error: Exception | None) -> Exception | None:
    if error is None or isinstance(error, (UserError, RunFailed, Interrupted)):
        return error
    trouble = machine_trouble(error)
    reason = f"{trouble[0]}\n{remedy_of(trouble[1])}" if trouble else f"{type(error).__name__}: {error}"
    return RunFailed(f"rank {rank()}: {reason}")


def _raise_first(errors: list[Exception | None], own: Exception | None) -> None:
    first = next((error for error in errors if error is not None), None)
    if first is None:
        return
    if own is not None and not isinstance(own, (UserError, RunFailed, Interrupted)) and not machine_trouble(own):
        raise own  # a bug: the original traceback is more useful
    raise first from own
