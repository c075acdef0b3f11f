"""A save is whole or absent, runs beside the training, and fails on all ranks alike; the newest whole one is found.

What was saved comes back: with an engine that only writes a number.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from cook.base.errors import Interrupted, RunFailed, UserError
from cook.base.files import read_json, write_json
from cook.distill.teacher_loss import Projections
from cook.training import checkpoint as module
from cook.training.checkpoint import Position, Saver, find_checkpoint, load_checkpoint, stored_weights
from cook.training.manifest import steps, verify
from tests.recipe.tiny_run import REPOSITORY, run
from tests.training.fake_saves import FakeEngine, damage, delete, names, position, save, truncate
from tests.training.tiny_training import make_gates


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
    state = {"step": 3, "updates": 2, "tokens": 300, "seconds": 0.0, "log": [], "ranks": ranks}
    assert read_json(folder / "state.json") == state
    assert (folder / "latest").read_text() == "engine\n", "DeepSpeed's own tools find its files by this"


def test_the_training_continues_before_the_checkpoint_is_published_and_the_next_save_waits(tmp_path, monkeypatch):
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


def test_a_rank_that_has_left_the_others_publishes_nothing(tmp_path):
    """Its main thread learns that another rank has died, and ends the process group, while the files are hashed."""
    save(tmp_path, 1)
    with pytest.raises(RunFailed, match="the ranks have parted"):
        with Saver(tmp_path, stage="s", fingerprint="f", keep=5) as saver:
            saver._group = object()  # that of several ranks
            saver.save(FakeEngine(2), None, position(2), also=lambda: None)
            saver.wait()
    assert names(tmp_path) == ["latest", "step-1"] and verify(tmp_path / "step-1")


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


ENDINGS = (RunFailed("x"), Interrupted("x"), torch.OutOfMemoryError("x: out of memory"), MemoryError("x"))


@pytest.mark.parametrize("failure", ENDINGS, ids=lambda error: type(error).__name__)
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


def test_what_is_saved_comes_back(tmp_path):
    gates = make_gates()
    for step in (1, 2):
        gates.draw(step)
        gates.update(torch.linspace(-1, 1, len(gates.values)), step)
    torch.manual_seed(5)
    maps = Projections(seed=1)
    (maps.apply("a", torch.ones(2, 3), 4) ** 2).sum().backward()
    maps.update(maps.gradient())
    folder = save(
        tmp_path, 7, engine=FakeEngine(41), gates=gates, projections=maps, guard={"recent": [0.1]}, data={"row": 3}
    )
    drawn = torch.rand(3)
    assert names(tmp_path) == ["latest", "step-7"] and (tmp_path / "latest").read_text() == "step-7\n"
    assert verify(folder)["step"] == 7 and read_json(folder / "config.json") == {"layers": 2}

    engine, other, other_maps = FakeEngine(), make_gates(), Projections(seed=2)
    position = load_checkpoint(folder, verify(folder), engine, other, fingerprint="f", projections=other_maps)
    assert torch.equal(other_maps.weights["a"], maps.weights["a"])
    assert position == Position(step=7, updates=6, tokens=700, guard={"recent": [0.1]}, data={"row": 3})
    assert engine.number == 41 and not engine.resharded
    assert torch.equal(torch.rand(3), drawn)
    for key, value in gates.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("harm", [damage, truncate, delete])
@pytest.mark.parametrize(
    "file", ["engine/number", "gates.pt", "rng-0.pt", "config.json", "state.json", "manifest.json"]
)
def test_any_harm_to_any_file_is_noticed_and_the_one_before_is_taken(tmp_path, capsys, harm, file):
    save(tmp_path, 1, gates=make_gates())
    save(tmp_path, 2, gates=make_gates())
    harm(tmp_path / "step-2" / file)
    if (file, harm) == ("manifest.json", truncate):
        return  # its last byte is only a line end
    found = find_checkpoint(tmp_path, "auto")
    assert found is not None and found[0].name == "step-1"
    assert "using step-1 instead" in capsys.readouterr().err


def test_none_valid_is_an_error_and_none_at_all_is_a_fresh_start(tmp_path):
    assert find_checkpoint(tmp_path / "nothing", "auto") is None
    (tmp_path / "tmp-5").mkdir()  # a save that was killed
    (tmp_path / "step-x").mkdir()
    assert find_checkpoint(tmp_path, "auto") is None
    for step in (1, 2):
        truncate(save(tmp_path, step) / "engine" / "number")
    with pytest.raises(UserError, match="no checkpoint is valid") as caught:
        find_checkpoint(tmp_path, "auto")
    assert "step-1" in str(caught.value) and "step-2" in str(caught.value) and "--resume never" in str(caught.value)


def test_checkpoints_that_have_vanished_are_no_fresh_start(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no checkpoint is valid") as caught:
        find_checkpoint(tmp_path, "auto")
    assert "latest exists, but no checkpoint does" in str(caught.value)


@pytest.mark.parametrize("content", ["", "\0garbage\xff", "../../x", "step-9", "/etc/passwd"])
def test_whatever_latest_says_the_newest_valid_one_is_taken(tmp_path, content):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "latest").write_text(content)
    assert find_checkpoint(tmp_path, "auto")[0].name == "step-2"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("../../x")
    assert find_checkpoint(tmp_path, "auto")[0].name == "step-2"


def test_what_resume_asks_for(tmp_path):
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    assert find_checkpoint(tmp_path, "never") is None
    assert [found[0] for r in ("auto", str(one)) if (found := find_checkpoint(tmp_path, r))] == [two, one]
    for path, message in ((tmp_path / "gone", "no such file"), (tmp_path, "no such file")):
        with pytest.raises(UserError, match=message):
            find_checkpoint(tmp_path, str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "g"}, "other settings"),
        ({"layout": {**FakeEngine.layout, "precision": "bf16"}}, "another precision"),
        ({"layout": {**FakeEngine.layout, "optimizer": "Lion"}}, "another optimizer"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changes, message):
    folder = save(tmp_path, 1)
    engine = FakeEngine(99)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(folder, verify(folder) | changes, engine, None, fingerprint="f")
    assert engine.number == 99, "something was loaded before it was refused"
    assert "--resume never" in str(caught.value)


@pytest.mark.parametrize("changes", [{"world_size": 2}, {"layout": {**FakeEngine.layout, "zero_stage": 3}}])
def test_another_number_of_ranks_or_zero_stage_is_put_together_anew(tmp_path, changes):
    folder, engine = save(tmp_path, 1, engine=FakeEngine(5)), FakeEngine()
    load_checkpoint(folder, verify(folder) | changes, engine, None, fingerprint="f")
    assert engine.number == 5 and engine.resharded


def test_ranks_that_have_read_different_data_cannot_become_fewer(tmp_path):
    folder = save(tmp_path, 1)
    state = read_json(folder / "state.json")
    state["ranks"] = [{"guard": {}, "data": {"row": row}} for row in (1, 2)]
    write_json(folder / "state.json", state)
    manifest = read_json(folder / "manifest.json") | {"world_size": 2}
    with pytest.raises(UserError, match="its own position in the data"):
        load_checkpoint(folder, manifest, FakeEngine(), None, fingerprint="f")


def test_weights_are_not_read_from_a_checkpoint_that_was_changed(tmp_path):
    folder = save(tmp_path, 1)
    damage(folder / "engine" / "number")
    with pytest.raises(UserError, match="changed since it was saved"):
        stored_weights(folder)
