"""`cook checkpoint`: what there is, and whether it is whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cook.base.errors import UserError
from cook.cli import invoke
from tests.training.fake_saves import damage, save, truncate


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
