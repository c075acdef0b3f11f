"""Runs of the training loop that are stopped by a signal and resumed, on real engines, many in one process group.

`python … tiny_resume.py CASES.json OUT`: every rank writes `OUT.<rank>` with what it saw. A case's `folder` keeps its
checkpoints; `of` is copied into it first; `stop` is the step in which SIGTERM comes; `leave_out` spoils the resume;
`fault` breaks something on rank 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cook.base import distributed
from cook.base.errors import Interrupted, RunFailed
from cook.base.seeds import derived_seed, seed_everything
from cook.families.cpm_ant import ADAPTER
from cook.report.events import EventLog, read_log
from cook.training import checkpoint
from cook.training.checkpoint import Position, find_checkpoint, load_checkpoint
from cook.training.engine import Engine, initialise_processes
from cook.training.loop import Run, train
from tests.training import tiny_training as tiny

TRAINING = dataclasses.replace(tiny.TRAINING, micro_batch_size=2, save_every=2, log_every=1, schedule="linear")


class Stream(tiny.Batches):
    """Rows by a position of its own, not by the step; `restless` ones look different after every draw of Python's and
    numpy's generators."""

    def __init__(self, *, restless: bool, stop: int | None):
        self.read, self.restless, self.stop = 0, restless, stop
        self.ids: list[list[int]] = []

    def num_targets(self, step: int) -> int:
        return int((self.rows(range(self.read, self.read + tiny.ROWS))["targets"] != -100).sum())

    def micro_batches(self, step: int, rank: int, world_size: int, size: int) -> list[dict[str, torch.Tensor]]:
        if step + 1 == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        made = super().micro_batches(self.read // tiny.ROWS, rank, world_size, size)
        share = tiny.ROWS // world_size
        self.ids.append(list(range(self.read, self.read + tiny.ROWS))[rank * share :][:share])
        self.read += tiny.ROWS
        if self.restless:
            for batch in made:
                batch["segment"] = batch["segment"].clamp(max=random.randint(1, 2))
                batch["input"] = batch["input"].roll(int(np.random.randint(2)), 0)
        return made

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.read = state["read"]


def spoil(left_out: str, position: Position, engine: Engine, gates: Any) -> Position:
    """What a resume would be that had forgotten something."""
    if left_out == "learning rate":
        return dataclasses.replace(position, updates=0)
    if left_out == "data position":
        return dataclasses.replace(position, data=None)
    if left_out == "lambda":  # and its optimizer, the moments it is found with
        fresh = tiny.make_gates().controller.state_dict()
        gates.controller.load_state_dict(fresh)
    if left_out == "moments":
        for state in engine._engine.optimizer.optimizer.state.values():
            state["exp_avg"].zero_()
    return position


@contextlib.contextmanager
def broken(fault: str) -> Iterator[None]:
    """`write`: the files of step 4 cannot be written; `hash`: nor flushed, later; `blind`: the newest is not seen."""
    place, name = {"write": (torch, "save"), "hash": (checkpoint, "file_entry"), "blind": (checkpoint, "steps")}[fault]
    real = getattr(place, name)

    def breaks(*arguments: Any, **options: Any) -> Any:
        if fault == "blind":
            return real(*arguments)[1:]
        if "tmp-4" in str(arguments):
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    setattr(place, name, breaks)
    yield
    setattr(place, name, real)


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    with broken(case["fault"]) if "fault" in case and distributed.rank() == 1 else contextlib.nullcontext():
        return run_whole(case)


def run_whole(case: dict[str, Any]) -> dict[str, Any]:
    folder, rank = Path(case["folder"]), distributed.rank()
    if rank == 0 and "of" in case:
        shutil.copytree(case["of"], folder)
    distributed.barrier()
    restless, left_out = case.get("restless", False), case.get("leave_out", "")
    seed_everything(derived_seed(case.get("seed", 3), rank))

    def build() -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return ADAPTER.build({**tiny.CONFIG, "dropout_p": 0.2 if restless else 0.0})

    training = dataclasses.replace(TRAINING, **case.get("training", {}))
    training = dataclasses.replace(training, micro_batch_size=training.micro_batch_size // distributed.world_size())
    deepspeed = {**case.get("deepspeed", {}), "zero_optimization": {"stage": case["zero"]}}
    engine, gates = Engine(build, tiny.weights(), training, deepspeed), tiny.make_gates()
    attached = tiny.attach(engine.module, set(gates.sizes), {})
    found, position = find_checkpoint(folder / "checkpoints", "auto"), Position(step=0, tokens=0)
    if found:
        kept: Callable[..., Any] = checkpoint.restore_rng_state
        if left_out == "generators":
            checkpoint.restore_rng_state = lambda _: None
        position = load_checkpoint(*found, engine, gates, fingerprint="f")
        checkpoint.restore_rng_state = kept
        position = spoil(left_out, position, engine, gates)
    if case.get("copy"):
        engine.save(Path(case["copy"]))
    stream, ended = Stream(restless=restless, stop=case.get("stop")), "whole"
    with EventLog(folder, tensorboard=False, enabled=rank == 0) as log:
        log.rewind(position.step if found else -1)
        run = Run(
            name="x",
            engine=engine,
            batches=stream,
            training=training,
            attached=attached,
            gates=gates,
            extra_loss=None,
            checkpoints=folder / "checkpoints",
            fingerprint="f",
            on_save=lambda: None,
        )
        try:
            train(run, position, log)
        except (Interrupted, RunFailed) as end:
            ended = str(end)
    attached.remove()
    engine.close()
    records = read_log(folder / "log.jsonl") if rank == 0 else []
    for record in records:
        record.pop("tokens_per_second")
        record.pop("data_wait")
    return {"ended": ended, "found": found and found[0].name, "ids": stream.ids, "records": records}


def main() -> None:
    initialise_processes(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {name: run_case(case) for name, case in cases.items()}
    torch.save(results, f"{sys.argv[2]}.{distributed.rank()}")


if __name__ == "__main__":
    main()
