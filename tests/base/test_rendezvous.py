"""Ranks meet in bounded time, and by an interface that reaches the others."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

import psutil
import pytest

from cook.base import rendezvous
from cook.base.distributed import free_port, loopback
from cook.base.errors import RankLost, UserError
from cook.base.rendezvous import meet
from tests.recipe.tiny_run import REPOSITORY, run


@pytest.fixture
def launched(monkeypatch):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_without_a_launcher_there_is_nobody_to_meet(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert meet() is None


def test_ranks_that_do_not_come_are_named(launched):
    begun = time.monotonic()
    with pytest.raises(RankLost, match="only 1 of 2 ranks have connected within 1 s; missing: rank 1"):
        meet(1.0)
    assert time.monotonic() - begun < 10


def test_a_first_rank_that_does_not_come_is_named(launched):
    launched.setenv("RANK", "1")
    with pytest.raises(RankLost, match=r"no store of rank 0 at 127\.0\.0\.1:\d+"):
        meet(1.0)


def test_a_rank_alone_meets_itself_and_uses_the_loopback_interface(launched):
    launched.setenv("WORLD_SIZE", "1")
    meeting = meet(30.0)
    assert meeting is not None and [process.pid for process in meeting.processes] == [os.getpid()]
    assert os.environ["GLOO_SOCKET_IFNAME"] == loopback()


def came(*addresses: str) -> list[dict[str, Any]]:
    return [{"process": {"host": f"h{i}", "boot": ""}, "address": a, "network": ""} for i, a in enumerate(addresses)]


def test_the_interface_is_the_one_that_reaches_the_others(launched):
    """The first machine takes its own name for 127.0.1.1; the addresses of the others show the way."""
    outside = [
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]
    if not outside:
        pytest.skip("this machine has no interface but the loopback")
    name, address = outside[0]
    rendezvous._choose_interface(came("127.0.1.1", address), rank=0)
    assert os.environ["GLOO_SOCKET_IFNAME"] == name and os.environ["NCCL_SOCKET_IFNAME"] == f"={name}"
    launched.setenv("GLOO_SOCKET_IFNAME", "mine")
    rendezvous._choose_interface(came("127.0.1.1", address), rank=1)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine", "what the user says holds"


def test_where_no_interface_is_found_the_variable_is_named(launched):
    with pytest.raises(UserError, match="rank 1 on h1: no interface") as caught:
        rendezvous._choose_interface(came("203.0.113.71", "203.0.113.72"), rank=1)
    assert "set GLOO_SOCKET_IFNAME" in str(caught.value)


def test_a_single_rank_leaves_the_environment_as_it_was(tmp_path):
    """Programs that are started later would take the variables for those of a launcher, and wait for its store."""
    code = """
import os
from cook.base.rendezvous import INTERFACES, VARIABLES
from cook.training.engine import initialise_processes, leave_processes
for _ in range(2):
    before = [os.environ.get(name) for name in VARIABLES + INTERFACES]
    initialise_processes(1)
    assert os.environ["RANK"] == "0"
    leave_processes()
    assert [os.environ.get(name) for name in VARIABLES + INTERFACES] == before
"""
    done = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(REPOSITORY), GLOO_SOCKET_IFNAME="lo")
    assert done.code == 0, done
