"""OpenMP's threads wait passively where other processes use the cores, and as the user says where he says so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cook.base import waiting
from cook.base.waiting import choose_waiting, others_share

SPIN = [sys.executable, "-c", "while True: pass"]


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in (*waiting.SETTINGS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def measured(monkeypatch):
    def set_to(share):
        monkeypatch.setattr(waiting, "others_share", lambda seconds: share)

    monkeypatch.setattr(waiting.Path, "glob", lambda self, pattern: iter(()))
    return set_to


def test_threads_wait_passively_beside_busy_processes_only(measured):
    measured(0.05)
    assert choose_waiting() is None and "OMP_WAIT_POLICY" not in os.environ
    measured(0.5)
    assert "other processes use 50%" in str(choose_waiting()) and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", waiting.SETTINGS)
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
