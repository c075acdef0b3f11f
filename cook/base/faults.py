"""Named points at which a test can kill a rank, as a power failure would, or have it run out of memory.

Active only if COOK_FAULT_POINT is set.
"""

from __future__ import annotations

import os
import signal

import torch

from cook.base import distributed

VARIABLE = "COOK_FAULT_POINT"
"""`NAME:RANK` or `NAME:RANK:NTH`: the rank fails the NTH time (default 1) that it reaches the point. It is killed by
SIGKILL; at a point of `MEMORY` it raises the error of a full memory instead."""

NAMES = (
    "save.begin",
    "save.scratch",
    "save.file",
    "save.written",
    "save.agreed",
    "save.hashed",
    "save.gathered",
    "save.manifest",
    "save.synced",
    "save.aside",
    "save.renamed",
    "save.latest",
    "save.removing",
    "save.done",
    "step.backward",
    "step.weights",
    "step.end",
    "load.found",
    "load.engine",
    "load.done",
)
"""In the order in which a run reaches them. See `cook/training/checkpoint.py` for their exact places."""

MEMORY = ("memory.trial", "memory.step")
"""Before the backward pass of a trial, see `cook/training/micro_batch.py`, and of a step."""

_passed = 0


def point(name: str) -> None:
    """Kills this process without any cleanup, or raises, if the environment requests it at this point."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    assert name in (*NAMES, *MEMORY), name
    asked, rank, *nth = wanted.split(":")
    if (asked, int(rank)) != (name, distributed.rank()):
        return
    global _passed
    _passed += 1
    if _passed == (int(nth[0]) if nth else 1):
        if name in MEMORY:
            raise torch.OutOfMemoryError(f"out of memory, requested by {VARIABLE}")
        os.kill(os.getpid(), signal.SIGKILL)
