"""The newest whole checkpoint is found, and what was saved comes back: with an engine that only writes a number."""

from __future__ import annotations

import pytest
import torch

from cook.base.errors import UserError
from cook.base.files import read_json, write_json
from cook.distill.teacher_loss import Projections
from cook.training.checkpoint import find_checkpoint, load_checkpoint, stored_weights
from cook.training.manifest import verify
from cook.training.saver import Position
from tests.training.fake_saves import FakeEngine, damage, delete, names, save, truncate
from tests.training.tiny_training import make_gates


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
