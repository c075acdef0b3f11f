"""`python -m cook.training.checkpoint`: what there is, and whether it is whole."""

from __future__ import annotations

import runpy
import sys

import pytest

from cook.base.errors import UserError
from cook.training.listing import main
from tests.training.fake_saves import damage, save, truncate


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


def test_the_command(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="no checkpoints"):
        main(["ls", str(tmp_path)])
    monkeypatch.setattr(sys, "argv", ["checkpoint", "verify", str(tmp_path / "step-7")])
    monkeypatch.delitem(sys.modules, "cook.training.checkpoint", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("cook.training.checkpoint", run_name="__main__")
    assert end.value.code == 1 and "there is no such file" in capsys.readouterr().out
