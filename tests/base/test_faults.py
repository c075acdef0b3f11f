"""The points at which tests kill a run: they kill when asked, do nothing otherwise, and every name is in the code."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cook.base import faults
from cook.base.errors import out_of_memory

COOK = Path(faults.__file__).parents[1]


def code_of(wanted: str | None) -> int:
    script = "from cook.base.faults import point\nfor _ in range(3): point('save.begin')\npoint('save.done')"
    environment = {} if wanted is None else {faults.VARIABLE: wanted}
    return subprocess.run([sys.executable, "-c", script], env=environment, cwd=COOK.parent, check=False).returncode


def test_it_kills_the_rank_it_is_told_to_and_no_other():
    asked = [None, "save.begin:1", "save.begin:0:4", "save.begin:0", "save.begin:0:3", "save.done:0"]
    assert [code_of(wanted) for wanted in asked] == [0, 0, 0, *[-signal.SIGKILL] * 3]


def test_a_point_of_memory_raises(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "memory.step:0:2")
    monkeypatch.setattr(faults, "_passed", 0)
    faults.point("memory.step")
    with pytest.raises(torch.OutOfMemoryError) as error:
        faults.point("memory.step")
    assert out_of_memory(error.value)


def test_the_names_are_those_in_the_code():
    sources = [path.read_text() for path in COOK.rglob("*.py")]
    used = {name for source in sources for name in re.findall(r'\bpoint\("([a-z.]+)"\)', source)}
    assert used == {*faults.NAMES, *faults.MEMORY}
