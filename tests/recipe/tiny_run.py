"""A complete run in a temporary folder: a tiny model, a tiny corpus, both config files, and the commands on them."""

from __future__ import annotations

import copy
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.warm import interpreter

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = dict(
    vocab_size=420,
    dim_model=32,
    num_layers=3,
    num_heads=4,
    dim_head=8,
    dim_ff=24,
    position_bias_num_buckets=32,
    position_bias_max_distance=64,
    prompt_types=3,
    prompt_length=4,
    segment_types=3,
    eps=1e-6,
    half=False,
)
SITES = (
    "self_attention.project_q",
    "self_attention.project_k",
    "self_attention.project_v",
    "self_attention.attention_out",
    "ffn.ffn.w_in.w",
    "ffn.ffn.w_out",
)
ATT_FIRST = (
    "pretrain",
    "layer_mask",
    "layer_finetune",
    "att_mask",
    "att_finetune",
    "ffn_mask",
    "ffn_finetune",
    "random_baseline",
)
FFN_FIRST = (*ATT_FIRST[:3], "ffn_mask", "ffn_finetune", "att_mask", "att_finetune", "random_baseline")

WARM_VARIABLES = {"PYTHONPATH", "RANK", "WORLD_SIZE", "MASTER_PORT", "NUM_PROCESSES", "LAUNCHER", "FOLDER"}
"""Variables that no library reads at import."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out[-6000:]}\n--- stderr\n{self.err[-6000:]}"


def own_environment(**variables: str) -> dict[str, str]:
    """The environment of a program: without what a process group of this process has set in its own."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    environment = {name: value for name, value in os.environ.items() if name not in group}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **variables}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return environment


def run(command: Sequence[str], folder: Path, *, timeout: float = 120, stop: Any = None, **variables: str) -> Result:
    """Runs a command of this project in `folder`; on a timeout it is killed with all that it started.

    Args:
        command: Arguments after the interpreter, or a program of the environment with its own.
        folder: The working directory.
        timeout: Seconds.
        stop: A function of the process, called before waiting for it (to send a signal).
        variables: Added to the environment.
    """
    environment = own_environment(**variables)
    if variables.keys() <= WARM_VARIABLES and command[0] == sys.executable and is_program(command):
        is_launcher = "torch.distributed.run" in command  # programs that start launchers may look for their ranks
        command = [interpreter(inherited=is_launcher), *command[1:]]
    elif variables.keys() <= WARM_VARIABLES and command[0] in ("bash", "deepspeed"):
        # setup.sh takes the Python of an active environment.
        programs = Path(interpreter(inherited=True)).parent
        environment |= {"VIRTUAL_ENV": sys.prefix, "PATH": f"{programs}{os.pathsep}{environment['PATH']}"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        if stop is not None:
            stop(process)
        out, err = process.communicate(timeout=timeout)
    finally:
        _kill_group(process)
    return Result(code=process.returncode, out=out, err=err)


def is_program(command: Sequence[str]) -> bool:
    """Whether the arguments of an interpreter are a program that a warm interpreter can run."""
    first = command[3] if command[1] == "-W" else command[1]
    return first in ("-m", "-c") or first.endswith(".py")


def run_on_ranks(script: str, cases: Any, folder: Path, ranks: int, timeout: float = 600) -> list[Any]:
    """What each rank of a script of the tests saved: it reads `cases.json` and writes `out.RANK`."""
    (folder / "cases.json").write_text(json.dumps(cases))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    result = run([sys.executable, "-W", "ignore", *launcher, script, "cases.json", "out"], folder, timeout=timeout)
    assert result.code == 0, result
    return [torch.load(folder / f"out.{rank}", weights_only=True) for rank in range(ranks)]


def _kill_group(process: subprocess.Popen) -> None:
    # Its session holds exactly what it started: also ranks that a launcher has left behind.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()


def train(folder: Path, *options: str, ranks: int = 0, **keywords: Any) -> Result:
    """`cook/train.py` on the folder's config: plain, or with `ranks` under torchrun."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    script = str(REPOSITORY / "cook" / "train.py")
    return run([*launcher, script, "--config", "bmcook.json", *options], folder, **keywords)


def do_prune(folder: Path, *options: str, **keywords: Any) -> Result:
    """`do_prune.py` with these options."""
    return run([sys.executable, str(REPOSITORY / "do_prune.py"), *options], folder, **keywords)


def write_run(folder: Path, stages: Sequence[str] = (), **changes: Any) -> None:
    """Writes `corpus.txt`, `bmcook.json` and `l0_pruning.json` for a run with its outputs in `out/`.

    Args:
        folder: Where to; the commands run in it.
        stages: The recipe.
        changes: Values by dotted key with `__` for the dot, such as `training__steps=3` or `fine__prune_mode="ffn"`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "docs").mkdir(exist_ok=True)
    members = (json, shutil, subprocess, inspect)
    for module in members:
        (folder / "docs" / f"{module.__name__}.txt").write_text(inspect.getsource(module)[:12000])
    bmcook: dict[str, Any] = {
        "output_dir": "out",
        "seed": 3,
        "model": {"type": "cpm_ant", "config": MODEL},
        "tokenizer": {"type": "sentencepiece", "vocab_size": 400},
        "data": {"type": "text", "paths": ["docs"], "max_length": 40, "held_out": 0.25},
        "training": {
            "steps": 6,
            "train_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 0.02,
            "precision": "fp32",
            "log_every": 1,
            "eval_rows": 4,
            "threads": 1,
        },
        "deepspeed": {"zero_optimization": {"stage": 0}},
        "logging": {"tensorboard": False},
        "pruning": {
            "is_pruning": True,
            "mask_method": "coarse-grained",
            "pruned_module": [f"{site}.weight" for site in SITES],
        },
        "stages": [{"name": name} for name in stages],
    }
    scheme: dict[str, Any] = {
        "coarse-grained": {"train_mask": True, "coarse_mask": "out/masks/layer.pt", "target_sparsity": 0.35},
        "fine-grained": {
            "train_mask": True,
            "coarse_mask": "out/masks/layer.pt",
            "num_heads": 4,
            "dim_ff": 24,
            "target_num_heads": 2,
            "target_dimff": 10,
            "heads_mask": "out/masks/heads.pt",
            "dimff_mask": "out/masks/dimff.pt",
            "prune_mode": "att",
        },
    }
    files, names = {"bmcook": bmcook, "scheme": scheme}, {"coarse": "coarse-grained", "fine": "fine-grained"}
    files = copy.deepcopy(files)
    for key, value in changes.items():
        first, *rest = key.split("__")
        node: Any = files["scheme" if first in (*names, "joint", "gates") else "bmcook"]
        path = [names.get(first, first), *rest]
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    (folder / "bmcook.json").write_text(json.dumps(files["bmcook"]))
    (folder / "l0_pruning.json").write_text(json.dumps(files["scheme"]))


def read_log(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The records of a stage's log."""
    return [json.loads(line) for line in (folder / "out" / stage / "log.jsonl").read_text().splitlines()]


def last_step(folder: Path, stage: str) -> int:
    """The newest training step in a stage's log; 0 before the first one, when the log may already describe the data."""
    log = folder / "out" / stage / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((record["step"] for record in records if "loss" in record), default=0)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, apart from the record of how the last run ended."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "outcome.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
