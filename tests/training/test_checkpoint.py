"""Checkpoints are whole or absent, and the newest whole one is found: with an engine that only writes a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cook.base.errors import RunFailed, UserError
from cook.base.files import read_json, write_json
from cook.training.checkpoint import (
    Position,
    find_checkpoint,
    load_checkpoint,
    newest_valid,
    save_checkpoint,
    stored_weights,
    verify,
)
from tests.training.tiny_training import make_gates


class FakeEngine:
    """Writes and reads one number."""

    layout = "ZeRO 0, fp32, AdamW"

    def __init__(self, number: int = 0, fails: Exception | None = None):
        self.number, self.fails = number, fails

    def save(self, folder: Path) -> None:
        (folder / "engine").mkdir()
        (folder / "engine" / "number").write_text(str(self.number))
        if self.fails:
            raise self.fails

    def load(self, folder: Path) -> None:
        self.number = int((folder / "engine" / "number").read_text())

    def model_config(self) -> dict[str, Any]:
        return {"layers": 2}


def save(root: Path, step: int, *, keep: int = 10, engine: Any = None, gates: Any = None) -> Path:
    position = Position(step=step, tokens=100 * step)
    return save_checkpoint(root, engine or FakeEngine(step), gates, position, fingerprint="f", keep=keep)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_comes_back(tmp_path):
    gates = make_gates()
    for step in (1, 2):
        gates.draw(step)
        gates.update(torch.linspace(-1, 1, len(gates.log_alpha)), step)
    torch.manual_seed(5)
    folder = save(tmp_path, 7, engine=FakeEngine(41), gates=gates)
    drawn = torch.rand(3)
    assert names(tmp_path) == ["latest", "step-7"] and (tmp_path / "latest").read_text() == "step-7\n"
    assert verify(folder)["step"] == 7 and read_json(folder / "config.json") == {"layers": 2}

    engine, other = FakeEngine(), make_gates()
    position = load_checkpoint(folder, verify(folder), engine, other, fingerprint="f")
    assert position == Position(step=7, tokens=700) and engine.number == 41
    assert torch.equal(torch.rand(3), drawn)
    for key, value in gates.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_only_the_newest_stay(tmp_path):
    for step in (2, 4, 10, 6):  # 10 belongs to a future that was given up by going back to 4
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["latest", "step-4", "step-6"]
    save(tmp_path, 8, keep=0)
    assert names(tmp_path) == ["latest", "step-8"], "the one just written stays whatever is asked"


def test_a_damaged_newer_one_does_not_push_out_the_valid_ones(tmp_path, capsys):
    save(tmp_path, 2)
    save(tmp_path, 4)
    damage(tmp_path / "step-4" / "engine" / "number")
    save(tmp_path, 3, keep=1)
    found = newest_valid(tmp_path)
    assert found is not None and found[0].name == "step-3"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [damage, truncate, delete])
@pytest.mark.parametrize("file", ["engine/number", "gates.pt", "rng-0.pt", "config.json", "manifest.json"])
def test_any_harm_to_any_file_is_noticed_and_the_one_before_is_taken(tmp_path, capsys, harm, file):
    save(tmp_path, 1, gates=make_gates())
    save(tmp_path, 2, gates=make_gates())
    harm(tmp_path / "step-2" / file)
    if (file, harm) == ("manifest.json", truncate):
        return  # its last byte is only a line end
    found = newest_valid(tmp_path)
    assert found is not None and found[0].name == "step-1"
    assert "going back to step-1" in capsys.readouterr().err


def test_a_file_that_was_slipped_in_is_noticed(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "engine" / "zero_pp_rank_9_optim_states.pt").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="zero_pp_rank_9_optim_states.pt: not part of the checkpoint"):
        verify(folder)


@pytest.mark.parametrize("content", [{}, [], {"files": []}, {"files": {"a": 1}}, {"step": 1, "files": {}}])
def test_a_manifest_of_something_else_is_refused(tmp_path, content):
    folder = save(tmp_path, 1)
    write_json(folder / "manifest.json", content)
    with pytest.raises(UserError, match="not a checkpoint's manifest"):
        verify(folder)


def test_none_valid_is_an_error_and_none_at_all_is_a_fresh_start(tmp_path):
    assert newest_valid(tmp_path / "nothing") is None
    (tmp_path / "tmp-5").mkdir()  # a save that was killed
    (tmp_path / "step-x").mkdir()
    assert newest_valid(tmp_path) is None
    for step in (1, 2):
        truncate(save(tmp_path, step) / "engine" / "number")
    with pytest.raises(UserError, match="no checkpoint is valid") as caught:
        newest_valid(tmp_path)
    assert "step-1" in str(caught.value) and "step-2" in str(caught.value) and "--resume never" in str(caught.value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_failing_write_leaves_the_old_checkpoints_and_no_rubbish(tmp_path, error):
    save(tmp_path, 1)
    with pytest.raises(RunFailed, match="checkpoint of step 2 could not be written") as caught:
        save(tmp_path, 2, engine=FakeEngine(fails=error))
    assert "rank 0" in str(caught.value) and "older checkpoints are intact" in str(caught.value)
    assert names(tmp_path) == ["latest", "step-1"] and verify(tmp_path / "step-1")


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failing_publication_leaves_the_old_checkpoints(tmp_path, monkeypatch, call):
    save(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RunFailed, match="Input/output error"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["latest", "step-1"]
    assert newest_valid(tmp_path) is not None and (tmp_path / "latest").read_text() == "step-1\n"


def test_a_root_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="could not be written"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_a_killed_save_is_cleared_away_by_the_next(tmp_path):
    (tmp_path / "tmp-3").mkdir()
    (tmp_path / "tmp-3" / "engine").write_text("half")
    save(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step-3"]


def test_what_resume_asks_for(tmp_path):
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    assert find_checkpoint(tmp_path, "never") is None
    assert [found[0] for r in ("auto", str(one)) if (found := find_checkpoint(tmp_path, r))] == [two, one]
    for path, message in ((tmp_path / "gone", "no such file"), (tmp_path, "no such file")):
        with pytest.raises(UserError, match=message):
            find_checkpoint(tmp_path, str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"fingerprint": "g"}, "other settings"), ({"world_size": 2}, "another number of ranks"),
     ({"layout": "ZeRO 3, bf16, AdamW"}, "another layout")],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changes, message):
    folder = save(tmp_path, 1)
    engine = FakeEngine(99)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(folder, verify(folder) | changes, engine, None, fingerprint="f")
    assert engine.number == 99, "something was loaded before it was refused"
    assert "--resume never" in str(caught.value)


def test_weights_are_not_unpickled_from_a_checkpoint_that_was_changed(tmp_path):
    folder = save(tmp_path, 1)
    damage(folder / "engine" / "number")
    with pytest.raises(UserError, match="not what was saved"):
        stored_weights(folder)


def test_the_manifest_says_what_it_must(tmp_path):
    manifest = json.loads((save(tmp_path, 3) / "manifest.json").read_text())
    entry = manifest["files"].pop("engine/number")
    assert entry == {"size": 1, "sha256": "4e07408562bedb8b60ce05c1decfe3ad16b72230967de01f640b7e4729b49fce"}
    assert sorted(manifest.pop("files")) == ["config.json", "rng-0.pt"]
    assert manifest == {"step": 3, "tokens": 300, "world_size": 1, "fingerprint": "f", "layout": FakeEngine.layout}
