"""The scripts named as in the original: variables, options, devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.benchmarks.tiny_task import OPTIONS, record, write_model, write_sst2
from tests.recipe.tiny_run import REPOSITORY, Result, run


def script(folder: Path, name: str, *arguments: str, **variables: str) -> Result:
    return run(["bash", str(REPOSITORY / "scripts" / name), *arguments], folder, timeout=240, **variables)


@pytest.mark.parametrize("name", ["run.sh", "continued_run.sh", "run_squad.sh"])
def test_a_mode_is_needed(tmp_path, name):
    result = script(tmp_path, name, "finetune", "cpu")
    assert result.code == 2 and "pretrain, prune or export" in result.err


def test_variables_and_options_reach_the_command(tmp_path):
    """On the CPU, with a variable of the environment and an option that comes before one."""
    write_model(tmp_path / "model")
    write_sst2(tmp_path / "data", rows=16)
    variables = {name: OPTIONS[name] for name in ("epochs", "train_batch_size", "granularity", "learning_rate")}
    variables |= {"data_dir": str(tmp_path / "data"), "model": str(tmp_path / "model"), "max_length": "8"}
    own = [f"--{name}={OPTIONS[name]}" for name in ("precision", "threads", "tensorboard", "eval_batch_size")]
    own += [f"--output_dir={tmp_path / 'out'}", "--max_length", "32"]
    result = script(tmp_path, "run.sh", "pretrain", "0", *own, **variables)
    assert result.code == 0, result
    assert "no GPU 0 here: running on the CPU" in result.err and "16 rows, 2 steps × 8 rows" in result.out
    assert record(tmp_path, "out/pretrain/done.json")["steps"] == 2


def test_offline_downloads_say_what_to_do(tmp_path):
    # A proxy that nobody listens on: no name is looked up, nothing leaves this machine.
    nowhere = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    for result in (
        run(
            ["python", str(REPOSITORY / "scripts/download_glue_data.py"), "--tasks", "RTE", "--data_dir", "d"],
            tmp_path,
            **nowhere,
        ),
        script(tmp_path, "download_squad_data.sh", str(tmp_path / "squad"), **nowhere),
    ):
        assert result.code == 2 and "the download failed" in result.err and "copy the file to" in result.err, result
        assert "Traceback" not in result.err
