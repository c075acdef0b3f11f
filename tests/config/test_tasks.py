"""The task command's options: made from the dataclass, all mistakes at once."""

from __future__ import annotations

import dataclasses

import pytest

from cook.base.errors import UserError
from cook.config.tasks import TaskConfig, parse_task_options


def parsed(*options: str, mode: str = "prune") -> TaskConfig:
    return parse_task_options([mode, "--task_name=SST-2", *options])


def test_values_of_every_kind():
    found = parsed("--sparsities", "25 62.5,75", "--epochs=0.5", "--tensorboard=false", "--seed=3", "--block", "8")
    assert found.sparsities == (25.0, 62.5, 75.0) and found.epochs == 0.5 and found.tensorboard is False
    assert (found.seed, found.block, found.mode) == (3, 8, "prune")


def test_the_help_describes_every_option(capsys):
    with pytest.raises(SystemExit):
        parse_task_options(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TaskConfig):
        assert field.name == "mode" or f"--{field.name}" in text
    assert "Historical behaviours to reproduce" in text and "(default: 2e-05)" in text


def test_all_mistakes_at_once():
    with pytest.raises(UserError) as caught:
        parsed("--epochs=nan", "--learning_rate=x", "--warmup=2", "--scoring_steps=0", "--precision=fp8", "--seed=-1")
    for name in ("epochs", "learning_rate", "warmup", "scoring_steps", "precision", "seed"):
        assert f"--{name}" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "mode", "error"),
    [
        (["--distillation=1", "--task_name=SQuAD1.1"], "prune", "GLUE tasks only"),
        ([], "pretrain", "needs a model"),
        (["--resume=maybe"], "prune", '"auto", "never"'),
        (["--tensorboard=perhaps"], "prune", "true or false"),
        (["--sparsities=fifty"], "prune", "numbers"),
    ],
)
def test_a_mistake_is_told(options, mode, error):
    with pytest.raises(UserError, match=error):
        parsed(*options, mode=mode)


@pytest.mark.parametrize(("rows", "epochs", "steps"), [(64, "1", 2), (65, "1", 3), (7000, "3", 657), (1, "0.01", 1)])
def test_steps(rows, epochs, steps):
    assert parsed(f"--epochs={epochs}", "--train_batch_size=32").steps(rows) == steps


def test_trainings():
    config = parsed("--learning_rate=0.5", "--save_every=7", "--threads=2")
    training = config.training(10)
    assert (training.learning_rate, training.schedule, training.min_learning_rate) == (0.5, "linear", 0.0)
    assert (training.warmup, training.weight_decay, training.clip, training.threads) == (0.1, 0.01, 1.0, 2)
    frozen = config.training(10, frozen=True)
    assert frozen.learning_rate == frozen.weight_decay == 0.0 and frozen.train_weights


def test_a_deepspeed_file(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert parsed(f"--deepspeed={tmp_path / 'ds.json'}").deepspeed_config() == {"zero_optimization": {"stage": 1}}
    (tmp_path / "ds.json").write_text("[]")
    with pytest.raises(UserError, match="not a DeepSpeed config"):
        parsed(f"--deepspeed={tmp_path / 'ds.json'}").deepspeed_config()
    assert parsed().deepspeed_config() == {}
