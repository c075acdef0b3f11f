"""Work that each rank does by itself between two collectives. If it fails on one rank, all ranks raise the error.

If only one rank raised it, the others would wait in their next collective until a timeout, without knowing why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from cook.base import distributed
from cook.base.errors import Interrupted, RunFailed, UserError, machine_trouble, remedy_of

T = TypeVar("T")


def on_all_ranks(action: Callable[[], T]) -> T:
    """Runs `action` on every rank and waits until all have finished.

    Args:
        action: A function without collectives.

    Returns:
        The result of `action` on this rank.

    Raises:
        UserError, RunFailed: on every rank, the error of the first rank on which `action` failed.
    """
    result, error = _tried(action)
    _raise_first(distributed.gather(_for_all(error)), error)
    assert error is None
    return result  # type: ignore[return-value]


def on_first_rank(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 and broadcasts its result.

    Args:
        action: A function without collectives. Its result must be small and picklable.

    Returns:
        The result of rank 0, on every rank.

    Raises:
        UserError, RunFailed: on every rank, if `action` failed.
    """
    result, error = _tried(action) if distributed.rank() == 0 else (None, None)
    said, result = distributed.broadcast((_for_all(error), result))
    _raise_first([said], error)
    return result


def in_words(error: Exception) -> str:
    """Returns the message of an error; for an error caused by the machine, that of `machine_trouble`."""
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
    trouble, failed = machine_trouble(error), f"rank {distributed.rank()}"
    if trouble:
        return RunFailed(f"{failed}: {trouble[0]}\n{remedy_of(trouble[1])}")
    return RunFailed(f"{failed}: {type(error).__name__}: {error}")


def _raise_first(said: list[Exception | None], own: Exception | None) -> None:
    first = next((error for error in said if error is not None), None)
    if first is None:
        return
    if own is not None and not isinstance(own, (UserError, RunFailed, Interrupted)) and not machine_trouble(own):
        raise own  # a bug: the original traceback is more useful
    raise first from own
