"""The recipe's script: the whole of it on two ranks, started twice, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.stages.tiny_run import REPOSITORY, Result, contents, run, write_run

SCRIPT = str(REPOSITORY / "scripts" / "prune_cpm_ant.sh")


def script(folder: Path, *options: str, **variables: str) -> Result:
    return run(["bash", SCRIPT, *options], folder, timeout=240, **variables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run with whole paths: the script works from the repository."""
    folder = tmp_path_factory.mktemp("script")
    write_run(folder, ("pretrain", "layer_mask"), output_dir=str(folder / "out"), data__paths=[str(folder / "docs")])
    scheme = (folder / "l0_pruning.json").read_text().replace('"out/', f'"{folder}/out/')
    (folder / "l0_pruning.json").write_text(scheme)
    return folder


def test_the_whole_recipe_on_two_ranks_and_once_more(folder):
    options = [str(folder / "bmcook.json"), "--set", "training.steps=2"]
    first = script(folder, *options, NUM_PROCESSES="2")
    assert first.code == 0, first
    assert "ranks:  2" in first.out and "2 rank(s) on cpu" in first.out and "equal to rounding" in first.out
    assert json.loads((folder / "out" / "layer_mask" / "done.json").read_text())["steps"] == 2
    for name in ("pruned/config.json", "report/report.md"):
        assert (folder / "out" / name).exists()
    second = script(folder, *options)
    assert second.code == 0 and re.findall(r"(\w+): already finished", second.out) == ["pretrain", "layer_mask"]


@pytest.mark.parametrize("options", [["--config", "x"], ["--config=x"], ["--stage", "pretrain"], ["x", "--stage=all"]])
def test_options_that_would_speak_of_another_run_are_refused(folder, options):
    before = contents(folder)
    result = script(folder, *options)
    assert result.code == 2 and "name the config first" in result.err, result
    assert contents(folder) == before
