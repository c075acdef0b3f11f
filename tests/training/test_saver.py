"""A save is whole or absent, goes on beside the training, and fails on all ranks alike: with a fake engine."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from cook.base.errors import Interrupted, RunFailed
from cook.base.files import read_json
from cook.training import saver as module
from cook.training.manifest import steps, verify
from cook.training.saver import Saver
from tests.recipe.tiny_run import REPOSITORY, run
from tests.training.fake_saves import FakeEngine, names, position, save


def test_the_manifest_and_the_state_say_what_they_must(tmp_path):
    folder = save(tmp_path, 3, guard={"in_a_row": 1}, data={"row": 7})
    manifest = read_json(folder / "manifest.json")
    entry = manifest["files"].pop("engine/number")
    assert entry == {"size": 1, "sha256": "4e07408562bedb8b60ce05c1decfe3ad16b72230967de01f640b7e4729b49fce"}
    assert sorted(manifest.pop("files")) == ["config.json", "engine/beside", "latest", "rng-0.pt", "state.json"]
    assert len(manifest.pop("digest")) == 64
    assert manifest == {
        "stage": "s",
        "step": 3,
        "tokens": 300,
        "world_size": 1,
        "fingerprint": "f",
        "layout": FakeEngine.layout,
    }
    ranks = [{"guard": {"in_a_row": 1}, "data": {"row": 7}}]
    assert read_json(folder / "state.json") == {"step": 3, "updates": 2, "tokens": 300, "log": [], "ranks": ranks}
    assert (folder / "latest").read_text() == "engine\n", "DeepSpeed's own tools find its files by this"


def test_the_training_goes_on_before_the_checkpoint_is_published_and_the_next_save_waits(tmp_path, monkeypatch):
    gate, order, entry = threading.Event(), [], module.file_entry

    def slow(path: Path):
        gate.wait(10)
        order.append(path.name)
        return entry(path)

    monkeypatch.setattr(module, "file_entry", slow)
    with Saver(tmp_path, stage="s", fingerprint="f", keep=5) as saver:
        saver.save(FakeEngine(1), None, position(1), also=lambda: order.append("also"))
        assert order == ["also"] and names(tmp_path) == ["tmp-1"] and steps(tmp_path) == [] and saver.newest is None
        threading.Timer(0.05, gate.set).start()
        saver.save(FakeEngine(2), None, position(2), also=lambda: order.append("also 2"))
        assert steps(tmp_path)[0] >= 1 and saver.newest == tmp_path / "step-1"
        assert order.index("number") < order.index("also 2")
    assert steps(tmp_path) == [2, 1] and saver.newest == tmp_path / "step-2"


def test_a_failing_write_leaves_the_old_checkpoints_and_no_rubbish(tmp_path):
    error = RunFailed("a file: No space left on device")
    save(tmp_path, 1)
    with pytest.raises(RunFailed, match="checkpoint of step 2 could not be written") as caught:
        save(tmp_path, 2, engine=FakeEngine(fails=error))
    assert "rank 0" in str(caught.value) and "older checkpoints are intact" in str(caught.value)
    assert names(tmp_path) == ["latest", "step-1"] and verify(tmp_path / "step-1")


def test_what_goes_with_a_checkpoint_fails_with_it(tmp_path):
    def also() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunFailed, match="No space left"):
        save(tmp_path, 2, also=also)
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_failing_publication_is_heard_at_the_next_step_and_leaves_the_old_checkpoints(tmp_path, monkeypatch, call):
    save(tmp_path, 1)
    real = getattr(os, call)

    def fail(*arguments: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(5, "Input/output error")
        real(*arguments)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RunFailed, match="Input/output error"):
        with Saver(tmp_path, stage="s", fingerprint="f", keep=5) as saver:
            saver.save(FakeEngine(2), None, position(2), also=lambda: None)
            saver._thread.join()
            assert saver.failed
            saver.wait()
    monkeypatch.undo()
    assert names(tmp_path) == ["latest", "step-1"] and verify(tmp_path / "step-1")
    assert (tmp_path / "latest").read_text() == "step-1\n"


def test_a_failing_replacement_puts_the_old_checkpoint_back(tmp_path, monkeypatch):
    save(tmp_path, 1, engine=FakeEngine(41))
    real, calls = os.rename, []

    def fail_second(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(*arguments)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(RunFailed, match="Input/output error"):
        save(tmp_path, 1, engine=FakeEngine(42))
    assert names(tmp_path) == ["latest", "step-1"] and (tmp_path / "step-1" / "engine" / "number").read_text() == "41"


def test_a_root_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="could not be written"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_what_killed_saves_have_left_is_cleared_away_by_the_next(tmp_path):
    for name in ("tmp-3", "tmp-2", "tmp-removed-step-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "engine").write_text("half")
    save(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step-3"]


@pytest.mark.parametrize("failure", [RunFailed("x"), Interrupted("x")])
def test_a_run_that_ends_waits_for_what_is_under_way(tmp_path, failure):
    with pytest.raises(type(failure), match="x"), Saver(tmp_path, stage="s", fingerprint="f", keep=5) as saver:
        saver.save(FakeEngine(1), None, position(1), also=lambda: None)
        raise failure
    assert names(tmp_path) == ["latest", "step-1"]


@pytest.fixture(scope="module")
def failing_saves(tmp_path_factory):
    """What each rank saw of every save in which one call on one rank failed."""
    folder = tmp_path_factory.mktemp("failing_saves")
    sys.path.append(str(REPOSITORY / "scripts" / "faults"))
    import failing_calls

    library = failing_calls.build(folder)
    if library is None:
        pytest.skip("no compiler for the library that lets calls fail")
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script, out = REPOSITORY / "tests" / "training" / "failing_saves.py", folder / "out"
    command = [sys.executable, *launcher, str(script), str(folder / "run"), str(out)]
    result = run(command, REPOSITORY, timeout=300, **failing_calls.preloaded(library))
    assert result.code == 0, result
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in (0, 1)], str(folder / "run")


@pytest.mark.parametrize("culprit", [0, 1])
def test_whichever_call_of_a_save_fails_all_ranks_say_alike_which_rank_and_file_it_was(failing_saves, culprit):
    (first, second), folder = failing_saves
    tried = [(a, b) for a, b in zip(first, second, strict=True) if a["culprit"] == culprit and a["nth"]]
    assert len(tried) > 20
    failed = 0
    for a, b in tried:
        assert a["said"] == b["said"] and max(a["seconds"], b["seconds"]) < 10, (a, b)
        assert a["rubbish"] == [], a
        if a["said"] is None:
            assert a["step"] in a["valid"] and not a["for_good"], a  # a folder that is there need not be made
        else:
            failed += 1
            assert f"rank {culprit}: {folder}" in a["said"] and os.strerror(a["code"]) in a["said"], a
    assert failed > 0.8 * len(tried)


def test_no_failing_save_takes_an_older_checkpoint_with_it(failing_saves):
    (first, _), _ = failing_saves
    for before, after in zip(first, first[1:], strict=False):
        assert 1 in after["valid"] and set(before["valid"]) <= set(after["valid"]), after
