"""A run that was stopped and started again is bit for bit the uninterrupted run, with the real command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from cook.base.files import sha256
from cook.base.outcome import recorded_code
from cook.pruning.relaxation import HardConcrete
from cook.report.events import TIMES
from cook.report.gate_log import read_gate_log
from cook.training.manifest import seal
from tests.recipe.tiny_run import Result, contents, last_step, read_log, train, write_run
from tests.warm import process_of

STEPS = 60
STOP_AT = 15
OVERRIDES = ("training.save_every=7", "training.keep_checkpoints=2", f"training.steps={STEPS}")
OPTIONS = ("--stage", "layer_mask", *(part for text in OVERRIDES for part in ("--set", text)))


def stop_by(folder: Path, step: int, to_a_rank: bool, process: subprocess.Popen) -> None:
    """Sends SIGTERM once the log has reached a step: to the command, or to the last of the ranks it has started."""
    deadline = time.monotonic() + 90
    while last_step(folder, "layer_mask") < step:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or never got there"
        time.sleep(0.005)
    parent = str(process_of(process.pid))
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", parent], capture_output=True, text=True)
    ranks = [int(pid) for pid in children.stdout.split()]
    os.kill(ranks[-1] if to_a_rank else process.pid, signal.SIGTERM)


def interrupted(folder: Path, *, to_a_rank: bool = False, **keywords) -> Result:
    return train(folder, *OPTIONS, stop=lambda process: stop_by(folder, STOP_AT, to_a_rank, process), **keywords)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    write_run(folder, ("pretrain", "layer_mask"), model__config__dropout_p=0.1)
    result = train(folder, "--stage", "pretrain")
    assert result.code == 0, result
    return folder


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    pointer = target / "out" / "data.json"  # holds whole paths
    pointer.write_text(pointer.read_text().replace(str(source), str(target)))
    return target


@pytest.fixture(scope="module")
def whole(pretrained, tmp_path_factory) -> Path:
    folder = copy(pretrained, tmp_path_factory.mktemp("whole") / "run")
    result = train(folder, *OPTIONS)
    assert result.code == 0, result
    return folder


@pytest.fixture(scope="module")
def stopped(pretrained, tmp_path_factory) -> tuple[Path, Result]:
    folder = copy(pretrained, tmp_path_factory.mktemp("stopped") / "run")
    return folder, interrupted(folder)


def outcome(folder: Path) -> dict:
    """All that a stage leaves that does not speak of time."""
    stage = folder / "out" / "layer_mask"
    log = [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(folder, "layer_mask")]
    done = json.loads((stage / "done.json").read_text())
    done.pop("seconds")
    gates = torch.load(stage / "checkpoints" / f"step-{STEPS}" / "gates.pt")
    return {
        "log": log,
        "done": done,
        "gates": {key: value.tolist() for key, value in gates.items()},
        "weights": sha256(stage / "model" / "model.safetensors"),
        "mask": sha256(folder / "out" / "masks" / "layer.pt"),
    }


def test_a_signal_saves_and_ends_with_the_documented_code(stopped):
    folder, result = stopped
    assert result.code == 75, result
    assert "stopped: layer_mask saved step" in result.err and "Traceback" not in result.err
    checkpoints = folder / "out" / "layer_mask" / "checkpoints"
    newest = (checkpoints / "latest").read_text().strip()
    assert STOP_AT <= int(newest.removeprefix("step-")) < STEPS and (checkpoints / newest).is_dir()
    assert not (folder / "out" / "layer_mask" / "done.json").exists()
    assert (folder / "out" / "masks" / "layer.pt").exists(), "masks are saved during training too"
    ended = json.loads((folder / "out" / "outcome.json").read_text())
    assert (ended["code"], ended["stage"], ended["step"]) == (75, "layer_mask", int(newest.removeprefix("step-")))
    assert not list(checkpoints.glob("tmp*"))


def test_a_resumed_run_is_bit_identical_to_the_uninterrupted_one(stopped, whole, tmp_path):
    folder = copy(stopped[0], tmp_path / "run")
    stage = folder / "out" / "layer_mask"
    with open(stage / "gates.bin", "ab") as later:  # of steps that a killed run has not saved
        later.write((STEPS - 1).to_bytes(4, "little") + bytes(6))
    result = train(folder, *OPTIONS)
    assert result.code == 0 and "resuming from step" in result.out, result
    assert recorded_code(folder / "out") == 0
    groups, records = read_gate_log(stage)
    steps = [step for step, _ in records]
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == STEPS
    assert all(any(values) for _, values in records), "the later record is still there"
    assert [group["name"] for group in groups] == [f"layers.{n}.{site}" for n in range(3) for site in ("att", "ffn")]
    steps = [record["step"] for record in read_log(folder, "layer_mask") if "loss" in record]
    assert steps == list(range(1, STEPS + 1))
    assert outcome(folder) == outcome(whole)
    spent = json.loads((stage / "checkpoints" / f"step-{STEPS}" / "state.json").read_text())["seconds"]
    assert 0 < spent <= json.loads((stage / "done.json").read_text())["seconds"] + 0.05, "of both runs"
    left = sorted(path.name for path in (folder / "out" / "layer_mask" / "checkpoints").iterdir())
    assert left == ["latest", f"step-{STEPS // 7 * 7}", f"step-{STEPS}"]


def test_the_log_of_the_gates_changes_nothing_else(pretrained, whole, tmp_path):
    folder = copy(pretrained, tmp_path / "run")
    assert train(folder, *OPTIONS, "--set", "training.log_gates=false").code == 0
    assert not list(folder.rglob("gates.bin")) and list(whole.rglob("gates.bin"))
    assert outcome(folder) == outcome(whole)
    step, last = read_gate_log(whole / "out" / "layer_mask")[1][-1]
    values = torch.load(whole / "out" / "layer_mask" / "checkpoints" / f"step-{step}" / "gates.pt")["values"]
    assert list(last) == (HardConcrete().openness(values) * 255).round().int().tolist()


def newest(folder: Path) -> Path:
    checkpoints = folder / "out" / "layer_mask" / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text().strip()


@pytest.mark.parametrize("left_out", ["gates' moments", "generator"])
def test_a_checkpoint_that_lacked_something_would_be_noticed(stopped, whole, tmp_path, left_out):
    folder = copy(stopped[0], tmp_path / "run")
    checkpoint = newest(folder)
    file = checkpoint / ("gates.pt" if left_out == "gates' moments" else "rng-0.pt")
    state = torch.load(file)
    for key in ("moment", "second_moment") if left_out == "gates' moments" else ():
        state[key].zero_()
    if left_out == "generator":
        state["cpu"] = torch.Generator().manual_seed(0).get_state()
    torch.save(state, file)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(seal(manifest)))
    assert train(folder, *OPTIONS).code == 0
    assert outcome(folder)["log"] != outcome(whole)["log"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(stopped, whole, tmp_path):
    folder = copy(stopped[0], tmp_path / "run")
    damaged = newest(folder)
    file = max((path for path in damaged.rglob("*.pt")), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    result = train(folder, *OPTIONS)
    assert result.code == 0 and "changed since it was saved; using step-" in result.err, result
    assert outcome(folder) == outcome(whole)


def refused(folder: Path, message: str, *options: str, ranks: int = 0) -> None:
    """The command refuses, says why without a traceback, and leaves every file as it was."""
    before = contents(folder)
    result = train(folder, *OPTIONS, *options, ranks=ranks)
    assert message in result.err and contents(folder) == before, result
    if ranks:  # torchrun has a code and a traceback of its own, and tells what the ranks ended with
        assert result.code == 1 and "exitcode  : 2" in result.err and "SIGABRT" not in result.err, result
    else:
        assert result.code == 2 and "Traceback" not in result.err, result


def test_what_cannot_be_resumed_is_refused_and_nothing_is_written(stopped, tmp_path):
    folder = copy(stopped[0], tmp_path / "run")
    checkpoints = folder / "out" / "layer_mask" / "checkpoints"
    refused(folder, "no such file", "--resume", str(checkpoints / "step-1"), ranks=2)
    for manifest in checkpoints.rglob("manifest.json"):
        manifest.write_text("{}")
    refused(folder, "no checkpoint is valid")
    assert recorded_code(folder / "out") == 2


def test_two_ranks_under_zero_3_stopped_by_a_signal_to_one_of_them(pretrained, tmp_path):
    runs = [copy(pretrained, tmp_path / name) for name in ("whole", "stopped")]
    for folder in runs:
        config = json.loads((folder / "bmcook.json").read_text())
        config["deepspeed"] = {"zero_optimization": {"stage": 3}}
        (folder / "bmcook.json").write_text(json.dumps(config))
    assert train(runs[0], *OPTIONS, ranks=2).code == 0
    assert recorded_code(runs[0] / "out") == 0
    result = interrupted(runs[1], to_a_rank=True, ranks=2)
    assert result.code != 0 and "stopped: layer_mask saved step" in result.err, result
    assert recorded_code(runs[1] / "out") == 75, "torchrun hides it"
    assert train(runs[1], *OPTIONS, ranks=2).code == 0
    assert outcome(runs[1]) == outcome(runs[0])
