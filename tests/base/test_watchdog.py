"""A rank that is lost ends all the others, soon and with its name; what is merely slow does not."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cook.base.watchdog import PATIENCE, Watchdog, _run_at_most
from tests.base.lost_ranks import BAD_STEP
from tests.recipe.tiny_run import run

LOST = ["killed 1", "killed 0", "wrapped 1", "frozen 2", "frozen 0"]
CASES = [*LOST, "stuck 1", "fails 1", "agree", "slow", "well", "unwatched", "launcher"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).parent / "lost_ranks.py")
    # What is compared is what the watchdog says, not what torch's sockets have to say about this machine's names.
    done = run([sys.executable, script, str(folder), *CASES], folder, timeout=300, TORCH_CPP_LOG_LEVEL="ERROR")
    assert done.code == 0, done
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", LOST)
def test_a_rank_that_is_gone_is_named_with_its_step_and_ends_the_others(results, case):
    how, rank = case.split()
    codes, out = results[case]["codes"], results[case]["out"]
    # Also the frozen one has been killed: nothing is left behind.
    assert codes[int(rank)] == -9 and [c for r, c in enumerate(codes) if r != int(rank)] == [76, 76], out
    word = "has been silent" if how == "frozen" else "has died"
    assert re.search(rf"failed: rank {rank}\b.*{word}", out), out
    assert re.search(rf"step ({BAD_STEP - 1}|{BAD_STEP})\b", out) and "run the same command again" in out
    assert "Traceback" not in out


def test_ranks_that_wait_for_one_another_for_ever_are_ended_and_say_where_they_are(results):
    codes, out = results["stuck 1"]["codes"], results["stuck 1"]["out"]
    assert codes == [76, 76, 76] and "no progress" in out, out
    assert f"rank 1 is last seen at step {BAD_STEP} (step)" in out


def test_the_error_of_one_rank_is_what_the_others_report(results):
    codes, out = results["fails 1"]["codes"], results["fails 1"]["out"]
    assert codes == [76, 1, 76] and out.count("has failed") == 2, out
    assert "ValueError: an error of one rank" in out and "raised RuntimeError" not in out


def test_an_error_of_all_ranks_keeps_its_own_code(results):
    assert results["agree"]["codes"] == [1, 1, 1], results["agree"]["out"]
    assert results["agree"]["out"].count("failed: an error of all ranks") == 3


@pytest.mark.parametrize("case", ["slow", "well", "unwatched"])
def test_what_is_slow_or_well_is_left_alone(results, case):
    assert results[case] == {"codes": [0, 0, 0], "out": "", "outcome": 0}


def test_without_its_launcher_a_run_stops_as_if_told_to(results):
    assert results["launcher"]["codes"] == [75, 75, 75], results["launcher"]
    assert "the launcher has ended" in results["launcher"]["out"]


@pytest.mark.parametrize("case", CASES)
def test_the_outcome_is_recorded_whoever_is_lost(results, case):
    codes = {"agree": 1, "launcher": 75} | dict.fromkeys(("slow", "well", "unwatched"), 0)
    assert results[case]["outcome"] == codes.get(case, 76)


def test_a_single_rank_is_not_watched(monkeypatch):
    with Watchdog(5.0) as watchdog:
        for phase in PATIENCE:
            watchdog.at(1, phase)
    with pytest.raises(AssertionError):
        watchdog.at(1, "sleeping")


def test_a_store_that_never_answers_does_not_stop_the_watchdog(monkeypatch):
    # The store of a stopped process blocks every call. The thread that decides must not wait for it.
    watchdog = Watchdog(1.0)
    watchdog._rank, watchdog._world = 1, 2
    answer = threading.Event()
    monkeypatch.setattr("cook.base.watchdog.GRACE", 0.1)
    monkeypatch.setattr(watchdog, "_reports", lambda ranks: answer.wait(60) and {})
    assert watchdog._nobody_moves(5.0) is None
    answer.set()


@pytest.mark.parametrize("phase", ["starting", "step"])
@pytest.mark.parametrize("stopped", [True, False])
def test_only_a_rank_that_is_not_stopped_has_longer_to_start(phase, stopped):
    # Imports hold the interpreter lock for longer than a short timeout. A stopped process imports nothing.
    watchdog, now = Watchdog(1.0), time.monotonic()
    process = SimpleNamespace(pid=7, host="here", fate=lambda: "alive", is_stopped=lambda: stopped)
    watchdog._rank, watchdog._world, watchdog._launchers, watchdog._processes = 1, 2, [], [process, process]
    watchdog.at(1, "step")
    watchdog._next = {**watchdog._next, "phase": phase}
    watchdog._received, watchdog._answered = now - 5, now
    verdict = watchdog._judge(now)
    if phase == "starting" and not stopped:
        assert verdict is None
        watchdog._received = now - 61
        verdict = watchdog._judge(now)
    assert verdict is not None and "rank 0 (process 7 on here) has been silent" in verdict


def test_a_rank_without_memory_for_a_thread_ends_all_the_same(monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    called = []
    _run_at_most(1.0, lambda: called.append(1))
    assert called == []
