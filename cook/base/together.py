"""Work that ranks do by themselves between two collectives: where it fails on one rank, all ranks end, and alike.

A rank that leaves alone lets the others wait in their next collective until a timeout, and they cannot say why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from cook.base import distributed
from cook.base.errors import Interrupted, RunFailed, UserError, machine_trouble, remedy_of

T = TypeVar("T")


def on_all_ranks(action: Callable[[], T]) -> T:
    """What `action` gives on this rank, once it has gone well on all; it must not use collectives.

    Raises:
        UserError, RunFailed: on every rank, what it met on the first rank where it failed.
    """
    result, error = _tried(action)
    _raise_first(distributed.gather(_for_all(error)), error)
    assert error is None
    return result  # type: ignore[return-value]


def on_first_rank(action: Callable[[], T]) -> T:
    """What `action` gives on the first rank, on every rank; it must not use collectives.

    Raises:
        UserError, RunFailed: on every rank, what it met.
    """
    result, error = _tried(action) if distributed.rank() == 0 else (None, None)
    said, result = distributed.broadcast((_for_all(error), result))
    _raise_first([said], error)
    return result


def in_words(error: Exception) -> str:
    """What went wrong, on one line if the machine is to blame: files are named as in `machine_trouble`."""
    trouble = machine_trouble(error)
    return trouble[0] if trouble else str(error) or type(error).__name__


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # whatever it is, all ranks must hear of it
        return None, error


def _for_all(error: Exception | None) -> Exception | None:
    if error is None or isinstance(error, (UserError, RunFailed, Interrupted)):
        return error
    trouble, failed = machine_trouble(error), f"rank {distributed.rank()}"
    if trouble:
        return RunFailed(f"{failed}: {trouble[0]}\n{remedy_of(trouble[1])}")
    return RunFailed(f"{failed}: {type(error).__name__}: {error}")


def _raise_first(said: list[Exception | None], own: Exception | None) -> None:
    first = next((error for error in said if error is not None), None)
    if first is None:
        return
    if own is not None and not isinstance(own, (UserError, RunFailed, Interrupted)) and not machine_trouble(own):
        raise own  # a mistake of ours: where it happened, its traceback is worth more
    raise first from own
