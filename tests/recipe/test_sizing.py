"""Recipes that are fitted to the machine: fewer steps where it is slow, the same files where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cook.base.errors import UserError
from cook.recipe import sizing
from tests.recipe.tiny_run import write_run


@pytest.fixture
def run(tmp_path, monkeypatch):
    write_run(tmp_path, ("pretrain", "layer_mask"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps(path):
    recipe = json.loads(Path(path).read_text())
    return [stage.get("training", {}).get("steps", recipe["training"]["steps"]) for stage in recipe["stages"]]


def test_a_fast_machine_runs_the_recipe_as_it_is(run, monkeypatch):
    monkeypatch.setattr(sizing, "tokens_per_second", lambda settings: 1e9)
    assert sizing.fitted_recipe("bmcook.json", minutes=1) == "bmcook.json"


def test_a_slow_machine_gets_its_share_of_the_steps_and_keeps_it(run, monkeypatch, capsys):
    recipe = json.loads((run / "bmcook.json").read_text())
    recipe["training"]["steps"] = 400
    for stage in recipe["stages"]:
        stage["training"] = {"steps": 400}
    (run / "bmcook.json").write_text(json.dumps(recipe))
    tokens = 800 * recipe["training"]["train_batch_size"] * recipe["data"]["max_length"]
    monkeypatch.setattr(sizing, "tokens_per_second", lambda settings: sizing.OVERHEAD * tokens / 240)  # four minutes
    fitted = sizing.fitted_recipe("bmcook.json", minutes=1)
    assert fitted != "bmcook.json" and steps(fitted) == [100, 100]
    assert "25% of its steps" in capsys.readouterr().err
    monkeypatch.setattr(sizing, "tokens_per_second", lambda settings: 1e9)
    assert sizing.fitted_recipe("bmcook.json", minutes=1) == fitted, "an interrupted run resumes with the same steps"


def test_the_measured_speed_is_that_of_real_steps(run):
    assert sizing.tokens_per_second(sizing.load_config("bmcook.json", [])) > 0


def test_a_model_on_disk_is_refused(run):
    recipe = json.loads((run / "bmcook.json").read_text())
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    recipe["model"] = {"type": "cpm_ant", "path": "model"}
    (run / "bmcook.json").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match="fresh weights"):
        sizing.fitted_recipe("bmcook.json", minutes=1)
