"""Which checkpoints there are and which are whole; how one replaces another and old ones go; `cook checkpoint`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from cook.base.errors import UserError
from cook.base.files import read_json, write_json
from cook.cli import invoke
from cook.training.checkpoint import find_checkpoint
from cook.training.manifest import looks_whole, recover, remove_old, steps, verify
from tests.training.fake_saves import FakeEngine, damage, names, save, truncate


def test_only_the_newest_stay(tmp_path):
    for step in (2, 4, 10, 6):  # 10 belongs to a future that was given up by going back to 4
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["latest", "step-4", "step-6"]
    save(tmp_path, 8, keep=0)
    assert names(tmp_path) == ["latest", "step-8"], "the one just written stays whatever is asked"


def test_a_damaged_newer_one_does_not_push_out_the_valid_ones(tmp_path):
    save(tmp_path, 2)
    damage(save(tmp_path, 4) / "engine" / "number")
    save(tmp_path, 3, keep=1)
    assert find_checkpoint(tmp_path, "auto")[0].name == "step-3"


def test_one_that_is_not_whole_does_not_count_among_those_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    truncate(tmp_path / "step-2" / "engine" / "number")
    save(tmp_path, 4, keep=3)
    assert steps(tmp_path) == [4, 3, 2, 1]
    truncate(tmp_path / "step-4" / "engine" / "number")
    remove_old(tmp_path, 4, 1)
    assert steps(tmp_path) == [4, 3, 2, 1], "nothing goes for one that is not whole"
    save(tmp_path, 5, keep=2)
    assert steps(tmp_path) == [5, 4, 3]


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path):
    save(tmp_path, 1, engine=FakeEngine(1))
    save(tmp_path, 1, engine=FakeEngine(2))
    assert names(tmp_path) == ["latest", "step-1"] and (tmp_path / "step-1" / "engine" / "number").read_text() == "2"


def test_a_crash_between_the_two_renames_of_a_replacement_is_undone(tmp_path):
    folder = save(tmp_path, 5)
    os.rename(folder, tmp_path / "tmp-replaced-5")
    shutil.copytree(tmp_path / "tmp-replaced-5", tmp_path / "tmp-5")
    recover(tmp_path)
    assert names(tmp_path) == ["latest", "step-5"] and verify(folder)


@pytest.mark.parametrize("latest", ["step-1\n", "", "\x00", None])
def test_a_crash_before_latest_is_made_good(tmp_path, latest):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "latest").unlink()
    if latest is not None:
        (tmp_path / "latest").write_text(latest)
    (tmp_path / ".latest.tmp").write_text("ste")
    recover(tmp_path)
    assert names(tmp_path) == ["latest", "step-1", "step-2"] and (tmp_path / "latest").read_text() == "step-2\n"


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"files": []},
        {"files": {"a": 1}},
        {"step": 1, "files": {}},
        {"files": {"../x": {"size": 1, "sha256": ""}}},
    ],
)
def test_a_manifest_of_something_else_is_refused(tmp_path, content):
    folder = save(tmp_path, 1)
    if isinstance(content, dict) and content.get("files") and "../x" in content["files"]:
        content = read_json(folder / "manifest.json") | content
    write_json(folder / "manifest.json", content)
    with pytest.raises(UserError, match="not a valid checkpoint manifest"):
        verify(folder)
    assert not looks_whole(folder)


@pytest.mark.parametrize("key", ["step", "tokens", "world_size", "fingerprint", "layout", "stage", "digest"])
def test_a_manifest_of_which_a_bit_has_changed_is_refused(tmp_path, key):
    folder = save(tmp_path, 1)
    manifest = read_json(folder / "manifest.json")
    other = {int: 7, str: "x", dict: {"x": 1}}[type(manifest[key])]
    write_json(folder / "manifest.json", manifest | {key: other})
    with pytest.raises(UserError, match="manifest.json: changed since it was saved"):
        verify(folder)
    assert not looks_whole(folder)


def test_a_file_that_was_slipped_in_is_noticed(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "engine" / "zero_pp_rank_9_optim_states.pt").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="zero_pp_rank_9_optim_states.pt: not part of the checkpoint"):
        verify(folder)


def test_the_shares_of_a_verification_cover_every_file_once(tmp_path):
    folder = save(tmp_path, 1)
    files = sorted(read_json(folder / "manifest.json")["files"])
    for name in files:
        original = (folder / name).read_bytes()
        damage(folder / name)
        found = 0
        for part in range(3):
            try:
                verify(folder, part, 3)
            except UserError as error:
                assert name in error.what
                found += 1
        assert found == 1, name
        (folder / name).write_bytes(original)
    assert verify(folder)


def test_other_folders_are_no_checkpoints(tmp_path):
    for name in ("step-x", "step-01", "step-", "tmp-3", "step-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-6").write_text("")
    assert steps(tmp_path) == [4] and steps(tmp_path / "nothing") == []


def main(arguments):
    """The exit code."""
    try:
        invoke("checkpoint", arguments)
    except SystemExit as stop:
        return stop.code
    return 0


def test_it_lists_a_runs_checkpoints(tmp_path, capsys):
    for stage in ("pretrain", "layer_mask"):
        save(tmp_path / stage / "checkpoints", 3)
    truncate(save(tmp_path / "pretrain" / "checkpoints", 4) / "engine" / "number")
    damage(save(tmp_path / "pretrain" / "checkpoints", 5) / "manifest.json")
    for folder in (tmp_path / "pretrain" / "checkpoints", tmp_path / "pretrain"):
        assert main(["ls", str(folder)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[1].rsplit("/")[-1] for line in lines[2:]] == ["step-5", "step-4", "step-3"]
        assert "damaged" in lines[2] and "has another size" in lines[3] and "complete" in lines[4]
        assert "zero_stage 0, precision fp32, optimizer AdamW" in lines[4] and " 300 " in lines[4]
    main(["ls", str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4


def test_it_compares_contents(tmp_path, capsys):
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    assert main(["verify", str(tmp_path)]) == 0
    damage(two / "rng-0.pt")
    assert main(["verify", str(tmp_path)]) == 1 and main(["verify", str(one)]) == 0
    out = capsys.readouterr().out
    assert f"{two}: DAMAGED: {two / 'rng-0.pt'}: changed since it was saved" in out
    assert f"{one}: complete, 6 files" in out


def test_the_command(tmp_path):
    with pytest.raises(UserError, match="no checkpoints"):
        main(["ls", str(tmp_path)])
    command = [sys.executable, "-m", "cook", "checkpoint", "verify", str(tmp_path / "step-7")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "there is no such file" in done.stdout, done.stderr


def test_a_program_reads_the_list(tmp_path, capsys):
    folder = save(tmp_path, 3)
    main(["ls", str(tmp_path), "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    assert (row["checkpoint"], row["step"], row["tokens"], row["size"]) == (str(folder), 3, 300, size)
