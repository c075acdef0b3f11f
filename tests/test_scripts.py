"""The recipe's script: the whole of it on two ranks, started twice, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.recipe.tiny_run import REPOSITORY, Result, contents, run, write_run

SCRIPT = str(REPOSITORY / "scripts" / "prune_cpm_ant.sh")


def script(folder: Path, *options: str, **keywords: Any) -> Result:
    return run(["bash", SCRIPT, *options], folder, timeout=240, **keywords)


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


LAUNCHER = """
    import os, signal, subprocess, sys, time
    # What a launcher starts hears of signals too, and the launcher itself does not die of SIGUSR1.
    rank = "import signal, sys, time; from pathlib import Path\\n"
    rank += "def note(number, frame):\\n    Path(signal.Signals(number).name).touch()\\n"
    rank += "    if number == signal.SIGTERM: sys.exit()\\n"
    rank += "for number in (signal.SIGUSR1, signal.SIGTERM): signal.signal(number, note)\\n"
    rank += "Path('started').touch()\\nwhile True: time.sleep(0.05)"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    child = subprocess.Popen([sys.executable, "-c", rank], cwd=os.environ["FOLDER"])
    child.wait()
    time.sleep(30)
"""


def test_signals_to_the_script_reach_the_ranks_and_it_ends_with_the_launchers_code(folder, tmp_path):
    (tmp_path / "launcher.py").write_text(textwrap.dedent(LAUNCHER))

    def signals(process: subprocess.Popen) -> None:
        for number, mark in ((None, "started"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGTERM, "SIGTERM")):
            if number is not None:
                os.kill(process.pid, number)
            deadline = time.monotonic() + 60
            while not (tmp_path / mark).exists():
                assert time.monotonic() < deadline and process.poll() is None, mark
                time.sleep(0.02)

    launcher = f"{sys.executable} {tmp_path / 'launcher.py'}"
    result = script(folder, str(folder / "bmcook.json"), stop=signals, LAUNCHER=launcher, FOLDER=str(tmp_path))
    assert result.code == 75, result


def test_every_bench_can_start():
    """Names that the benches import still exist."""
    benches = sorted((REPOSITORY / "scripts" / "bench").glob("*.py"))
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(benches[0].parent)])}
    done = subprocess.run(
        [sys.executable, "-c", code, *(path.stem for path in benches)],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert len(benches) > 20 and done.returncode == 0, done.stderr[-2000:]
