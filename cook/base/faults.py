"""Named points at which a test can kill a rank, as a power failure would. Active only if COOK_FAULT_POINT is set."""

from __future__ import annotations

import os
import signal

from cook.base import distributed

VARIABLE = "COOK_FAULT_POINT"
"""`NAME:RANK` or `NAME:RANK:NTH`: the rank is killed by SIGKILL the NTH time (default 1) that it reaches the point."""

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

_passed = 0


def point(name: str) -> None:
    """Kills this process without any cleanup, if the environment requests it at this point."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    assert name in NAMES, name
    asked, rank, *nth = wanted.split(":")
    if (asked, int(rank)) != (name, distributed.rank()):
        return
    global _passed
    _passed += 1
    if _passed == (int(nth[0]) if nth else 1):
        os.kill(os.getpid(), signal.SIGKILL)
