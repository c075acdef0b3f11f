from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cook.base.processes import Process, this_process


def test_this_process_is_alive_and_travels_as_json():
    me = this_process()
    assert me.fate() == "alive" and me.pid == os.getpid() and me.started
    assert Process.from_json(me.as_json()) == me


def test_one_that_has_ended_is_dead_before_and_after_it_is_reaped():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    process = dataclasses.replace(this_process(), pid=child.pid, started=started)
    assert process.fate() == "alive" and not process.is_stopped()
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert process.fate() == "alive" and process.is_stopped()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.fate() == "dead", "a zombie does nothing any more"
    child.communicate()
    assert process.fate() == "dead"


def test_a_number_that_is_used_again_is_another_process():
    assert dataclasses.replace(this_process(), started="1").fate() == "dead"


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"boot": "an earlier boot"}])
def test_nothing_is_known_of_another_machine_or_namespace(change):
    for pid in (os.getpid(), 2**22 - 1):
        assert dataclasses.replace(this_process(), pid=pid, **change).fate() == "unknown"


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"pid": 1},
        {**this_process().as_json(), "pid": "1"},
        {**this_process().as_json(), "pid": 0},
        {**this_process().as_json(), "pid": -1},
        {**this_process().as_json(), "x": 1},
    ],
)
def test_what_describes_no_process(value):
    assert Process.from_json(value) is None


def test_an_impossible_number_proves_nothing():
    assert dataclasses.replace(this_process(), pid=2**70).fate() == "unknown"


RANK = """
import os, signal, sys, time
from cook.base import processes
ancestors = processes._ancestors()
os.kill(ancestors[0], signal.SIGKILL)
while processes._stat(ancestors[0])[0] != sys.argv[1].strip("-"):
    time.sleep(0.01)
processes._ancestors = lambda: ancestors
os.environ["TORCHELASTIC_RUN_ID"] = "1"
print(processes.launchers())
"""


@pytest.mark.parametrize(("state", "reaped"), [("Z", False), ("", True)])
def test_a_launcher_that_ends_while_a_rank_looks_for_it(state, reaped):
    # The process above it, this one, is a Python too, and must not be taken for the launcher.
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    command = [sys.executable, "-c", launcher, RANK, state or "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if reaped:
            process.wait()
        assert process.stdout.read() == "None\n"
