"""The `cook` command: help, usage errors and recipes."""

from __future__ import annotations

import json

import click
import pytest
import typer

from cook.base.errors import UserError
from cook.cli import app, invoke
from tests.command import told
from tests.recipe.tiny_run import REPOSITORY

COMMANDS = {
    "train": ("--config", "--set", "--stage", "--resume", "--dry-run"),
    "plan": ("--config", "--set", "--json", "--gpus", "--hosts", "--card", "--link", "--suggest"),
    "prune": ("--data", "--keep", "--output", "--steps", "--teacher"),
    "moefy": ("OUT", "--data", "--experts", "--shared", "--active", "--steps", "--dry-run"),
    "reshape": ("--model", "--coarse-mask", "--vocabulary", "--verify", "--uniform"),
    "report": ("--config", "--output"),
    "eval": ("--model", "--data", "--window", "--no-speed", "--trust-remote-code"),
    "profile": ("--length", "--phase", "--output"),
    "compare": ("--data", "--output", "--window", "--no-speed"),
    "quantize": ("MODEL", "OUT", "--config", "--scheme", "--group-size", "--module", "--format", "--data"),
    "families": ("--json",),
    "families guess": ("--json", "MODEL"),
    "serve": ("--home", "--host", "--port", "--root", "--allow-hub", "--tls-cert", "--behind-proxy", "--json"),
    "submit": ("--set", "--gpus", "--executor", "--slurm", "--watch", "--dry-run", "--server", "--json"),
    "jobs": ("--state", "--limit", "--server", "--json"),
    "watch": ("ID", "--server", "--json"),
    "logs": ("ID", "--follow", "--attempt", "--tail", "--json"),
    "stop": ("ID", "--now", "--json"),
    "resume": ("ID", "--json"),
    "get": ("ID", "DIR", "--only", "--json"),
    "gc": ("--days", "--dry-run", "--json"),
    "recipes list": ("--json",),
    "recipes copy": ("folder",),
    "checkpoint ls": ("--json", "DIR"),
    "checkpoint verify": ("DIR",),
    "data tokenizer": ("--vocab-size", "--format"),
    "data preprocess": ("--tokenizer", "--masked-share", "--block-size"),
    "data vocabulary": ("--tokenizer", "--min-count", "--output", "--json"),
    "data inspect": ("--samples", "--json"),
    "data shuffle": ("--memory", "--seed"),
    "data merge": ("--version", "--output"),
    "data convert": ("--block-size", "--output"),
}


def names(command: click.Command, prefix: str = "") -> list[str]:
    if not hasattr(command, "commands"):
        return [prefix.strip()]
    own = [prefix.strip()] if command.invoke_without_command else []
    return own + [name for key, each in command.commands.items() for name in names(each, f"{prefix} {key}")]


def test_every_command_is_tested():
    assert set(names(typer.main.get_command(app))) == {*COMMANDS, "tasks"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_options(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = told(capsys, *command.split(), "--help")
    assert code == 0 and [option for option in COMMANDS[command] if option not in out] == []
    assert "typing" not in out


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["plan", "--nothing"], ["prune"], ["data", "merge"], ["eval", "--window", "x"]]
)
def test_usage_errors_end_with_2(arguments, capsys):
    code, out, err = told(capsys, *arguments)
    assert code == 2 and "Usage" in err and "Traceback" not in out + err


def test_programs_read_recipes_and_families(capsys):
    invoke("recipes", ["list", "--json"])
    assert {"default", "smollm2"} <= set(json.loads(capsys.readouterr().out))
    invoke("families", ["--json"])
    assert {"Llama, SmolLM2"} <= {row["family"] for row in json.loads(capsys.readouterr().out)}


def test_a_plan_for_a_cluster_as_json(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    batch = "training.train_batch_size=64"
    code, out, _ = told(capsys, "plan", "--gpus", "8", "--hosts", "2", "--card", "H100", "--json", "--set", batch)
    facts = json.loads(out)
    assert code == 0 and (facts["ranks"], facts["card"]) == (16, "H100") and "suggested" not in facts
    assert all(row["estimate"]["micro_batch_size"] == 4 for row in facts["stages"])
    code, _, err = told(capsys, "plan", "--gpus", "3")
    assert code == 2 and "train_batch_size" in err  # 8 rows cannot be divided among 3 ranks
    code, _, err = told(capsys, "plan", "--gpus", "0", "--suggest")
    assert code == 2 and "2. --suggest" in err


def test_a_copied_recipe_lacks_only_its_model(tmp_path, capsys):
    invoke("recipes", ["copy", "smollm2", str(tmp_path / "mine")])
    with pytest.raises(UserError) as error:
        invoke("plan", ["--config", str(tmp_path / "mine" / "bmcook.json")])
    assert "model" in str(error.value) and "2." not in str(error.value)
    with pytest.raises(UserError, match="exists"):
        invoke("recipes", ["copy", "smollm2", str(tmp_path / "mine")])
    with pytest.raises(UserError, match="no recipe 'nothing'"):
        invoke("recipes", ["copy", "nothing", str(tmp_path / "other")])
