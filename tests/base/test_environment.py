"""Old libraries are refused. OpenMP's threads wait passively where other processes use the cores."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest

from cook.base import environment
from cook.base.environment import OLDEST, check_versions, choose_waiting, others_share
from cook.base.errors import UserError

SPIN = [sys.executable, "-c", "while True: pass"]


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in (*environment.SETTINGS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def measured(monkeypatch):
    def set_to(share):
        monkeypatch.setattr(environment, "others_share", lambda seconds: share)

    monkeypatch.setattr(environment.Path, "glob", lambda self, pattern: iter(()))
    return set_to


def test_threads_wait_passively_beside_busy_processes_only(measured):
    measured(0.05)
    assert choose_waiting() is None and "OMP_WAIT_POLICY" not in os.environ
    measured(0.5)
    assert "other processes use 50%" in str(choose_waiting()) and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", environment.SETTINGS)
def test_what_the_user_sets_is_kept(measured, monkeypatch, name):
    measured(0.9)
    monkeypatch.setenv(name, "1")
    assert choose_waiting() is None and os.environ[name] == "1"


def test_processes_of_another_group_count():
    cores = os.cpu_count() or 1
    # Twice as many as there are cores: beside any other load they get a third of the machine at least.
    other = [subprocess.Popen(SPIN, start_new_session=True) for _ in range(2 * cores)]
    try:
        assert others_share(1.0) > 0.25
    finally:
        for process in other:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("name", "version", "refused"),
    [
        ("torch", "2.9.1", True),
        ("torch", "2.10.0", False),
        ("torch", "2.10.0+cu130", False),
        ("torch", "2.6", True),
        ("torch", "3.0.0rc1", False),
        ("deepspeed", "0.15.0", True),
        ("deepspeed", "0.15.1", False),
        ("deepspeed", "0.15.1+abc123", False),
        ("deepspeed", "0.9.5", True),
    ],
)
def test_holes_are_refused_by_number(monkeypatch, name, version, refused):
    safe = {other: ".".join(map(str, oldest)) for other, (oldest, _) in OLDEST.items()}
    monkeypatch.setattr(importlib.metadata, "version", {**safe, name: version}.__getitem__)
    if refused:
        with pytest.raises(UserError, match=f"{name} is too old.*CVE") as caught:
            check_versions()
        assert version in str(caught.value)
    else:
        check_versions()


def test_what_is_installed_is_new_enough():
    check_versions()
