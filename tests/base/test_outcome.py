from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cook.base.errors import Interrupted, RankLost, RunFailed, UserError
from cook.base.lock import run_lock
from cook.base.outcome import Outcome, note_end, recorded_code


def read(folder: Path) -> dict:
    return json.loads((folder / "outcome.json").read_text())


def end(folder: Path, error: BaseException | None, rank: int = 0) -> None:
    """A run in `folder` that ends with `error`, in step 3 of its stage."""
    with Outcome(folder, rank) as outcome, run_lock(folder):
        outcome.taken()
        outcome.begin("layer_mask")
        outcome.at(3)
        (folder / "log").touch()
        if error:
            raise error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("bad", got=3), 2, "error: bad\n  got:    3"),
        (RunFailed("three bad steps"), 1, "failed: three bad steps"),
        (RankLost("rank 1 has died"), 76, "failed: rank 1 has died"),
        (Interrupted("saved step 3"), 75, "stopped: saved step 3"),
        (OSError(28, "No space left on device", "x"), 1, "failed: x: No space left on device"),
        (ValueError("a bug"), 1, "ValueError: a bug"),
    ],
)
def test_the_code_and_the_message_are_those_of_the_command(tmp_path, error, code, message):
    with pytest.raises(type(error)):
        end(tmp_path / "out", error)
    found = read(tmp_path / "out")
    assert found["code"] == code and found["message"].startswith(message)
    assert (found["stage"], found["step"]) == ("layer_mask", 3) and found["at"].endswith("Z")


def test_success_is_recorded_and_the_next_run_removes_it(tmp_path):
    end(tmp_path, None)
    assert read(tmp_path)["code"] == recorded_code(tmp_path) == 0
    with pytest.raises(KeyboardInterrupt), run_lock(tmp_path):
        Outcome(tmp_path).taken()
        assert recorded_code(tmp_path) is None
        raise KeyboardInterrupt  # as a kill: nothing more is written
    assert not (tmp_path / "outcome.json").exists()


def test_a_refused_run_does_not_touch_the_outcome_of_the_run_that_holds_the_folder(tmp_path):
    (tmp_path / "outcome.json").write_text('{"code": 75}')
    with run_lock(tmp_path):
        with pytest.raises(UserError, match="another run"), Outcome(tmp_path) as outcome, run_lock(tmp_path):
            outcome.taken()
        assert read(tmp_path) == {"code": 75}


def test_a_run_whose_folder_was_taken_since_writes_nothing(tmp_path):
    other = {"host": "elsewhere", "boot": "", "pid": 1, "started": ""}
    with Outcome(tmp_path) as outcome:
        outcome.taken()
        (tmp_path / "run.lock").write_text(json.dumps({"processes": [other], "slurm": {}}))
    assert not (tmp_path / "outcome.json").exists()


def test_a_refused_run_in_a_new_folder_leaves_nothing(tmp_path):
    with pytest.raises(UserError), Outcome(tmp_path / "out") as outcome, run_lock(tmp_path / "out"):
        outcome.taken()
        raise UserError("no such mask")
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_write_only_what_the_first_rank_cannot(tmp_path):
    outcome = Outcome(tmp_path, 1)
    outcome.taken()
    outcome.write(1, "failed: alone")
    assert recorded_code(tmp_path) is None
    outcome.write(76, "failed: rank 0 has died")
    assert recorded_code(tmp_path) == 76
    Outcome(tmp_path).taken()
    first = Outcome(tmp_path)
    first._taken = True
    first.write(1, "failed: three bad steps")
    outcome.write(76, "failed: rank 0 has failed")
    assert recorded_code(tmp_path) == 1, "what the others report is a consequence"


def test_a_thread_that_ends_the_process_writes_the_outcome(tmp_path):
    note_end(75, "no run yet")
    with Outcome(tmp_path) as outcome:
        outcome.taken()
        note_end(75, "stopped: the launcher has ended")
        assert recorded_code(tmp_path) == 75


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="there is no full device")
def test_a_full_disk_does_not_hide_how_the_run_ended(tmp_path, monkeypatch):
    (tmp_path / ".outcome.json.tmp").symlink_to("/dev/full")
    with pytest.raises(Interrupted, match="saved"):
        end(tmp_path, Interrupted("saved step 3"))
    assert not (tmp_path / "outcome.json").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"code": "0"}', "\0"])
def test_a_file_that_is_not_an_outcome_has_no_code(tmp_path, content):
    (tmp_path / "outcome.json").write_text(content)
    assert recorded_code(tmp_path) is None
