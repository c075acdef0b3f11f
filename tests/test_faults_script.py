"""A short version of every fault of `scripts/faults/run.py`, on real processes: nothing may be lost."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.recipe.tiny_run import REPOSITORY, Result, run

SCRIPT = str(REPOSITORY / "scripts" / "faults" / "run.py")
NAMES = [
    "kill -9 in mid-save",
    "kill -9 at each named point",
    "kill -9 in mid-step",
    "kill -9 while deleting",
    "file truncated",
    "bit flipped",
    "file deleted, exchanged, added",
    "latest wrong",
    "newest corrupt, one kept",
    "all corrupt",
    "disk full",
    "RLIMIT_FSIZE",
    "folder read-only",
    "fsync fails",
    "other files: disk full or broken",
    "log, TensorBoard: broken for a moment",
    "small disk for the model",
    "few open files, little memory",
    "SIGTERM, SIGINT",
    "SIGUSR1",
    "SIGTERM to the launcher",
    "launcher gone while ranks start",
    "SIGKILL of a rank, its launcher stops the other",
    "SIGKILL of a rank",
    "SIGSTOP of a rank",
    "rank 1 sees another newest",
    "second run, stale lock",
    "other number of ranks",
    "NaN loss, Inf gradient on a rank",
    "gradient × 1e6",
    "part of the state left out",
    "malicious mask or checkpoint",
]
ELSEWHERE = ["two hosts, one lost"]
"""`tests/test_two_hosts.py` tries every loss of this one."""
MAY_BE_UNTRIED = {
    "disk full",
    "folder read-only",
    "kill -9 at each named point",
    "fsync fails",
    "other files: disk full or broken",
    "log, TensorBoard: broken for a moment",
    "small disk for the model",
    "few open files, little memory",
}
"""Where mounting is not allowed or no compiler is there, or chance picks a rank that never comes to the point, or a
limit that is enough."""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[dict[str, Any], Result]:
    output = tmp_path_factory.mktemp("faults") / "faults.json"
    only = [option for name in NAMES for option in ("--only", name)]
    result = run([sys.executable, SCRIPT, "--kills", "1", *only, "--output", str(output)], REPOSITORY, timeout=2400)
    assert output.exists(), result
    return {row["fault"]: row for row in json.loads(output.read_text())["rows"]}, result


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost(told, name):
    rows, result = told
    row = rows[name]
    assert row["lost"] == 0 and (row["trials"] > 0 or name in MAY_BE_UNTRIED), result
    assert row["survived"] == row["trials"]


def test_the_table_lists_every_fault_and_the_code_says_whether_any_was_lost(told):
    rows, result = told
    assert list(rows) == NAMES and result.code == 0, result
    listed = run([sys.executable, SCRIPT, "--list"], REPOSITORY).out.splitlines()
    assert [name for name in listed if name not in ELSEWHERE] == NAMES
