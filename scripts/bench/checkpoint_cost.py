"""What a checkpoint costs beside DeepSpeed's plain `save_checkpoint`, and what a resume costs.

    python scripts/bench/checkpoint_cost.py [--zero 2] [--precision fp32] [--dims 256 512 1024] [--folder DIR]

Two CPU ranks. For each size of the model the ways take turns and medians are compared: DeepSpeed's writer alone, which
neither flushes nor hashes; the same with every file flushed to the disk, the least that survives a power cut; cook's.
`stall` is how long the training stands still; `published` is until the checkpoint exists. `steps beside / alone` is how
much slower a training step is while the thread hashes. A resume first compares every file with the manifest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import publish, run_ranks

LAYERS, LENGTH = 8, 32


def worker(options: argparse.Namespace) -> None:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from gated_step import SHAPES, batch_of

    from cook.base import distributed
    from cook.base.signals import Request
    from cook.config.types import TrainingConfig
    from cook.families.registry import by_config
    from cook.pruning.attach import AttachedGates
    from cook.training.checkpoint import Position, Saver, find_checkpoint, load_checkpoint
    from cook.training.engine import Engine, initialise_processes
    from cook.training.step import train_step

    initialise_processes(1)
    config = SHAPES["default"] | {"model_type": "cook_cpm_ant", "dim_model": options.dim, "num_layers": LAYERS}
    config |= {"num_heads": options.dim // 32, "dim_head": 32, "dim_ff": 3 * options.dim}
    adapter = by_config(config)
    training = TrainingConfig(
        steps=10, train_batch_size=2, micro_batch_size=1, learning_rate=1e-3, precision=options.precision
    )
    zero = {"zero_optimization": {"stage": options.zero}}

    def new_engine() -> Engine:
        return Engine(lambda: adapter.build(config), None, training, zero)

    engine = new_engine()
    batch, attached, root = batch_of(config, 1, LENGTH), AttachedGates(engine.module, [], {}), Path(options.folder)

    def step() -> None:
        train_step(
            engine,
            [dict(batch)],
            1,
            num_targets=2 * LENGTH,
            learning_rate=1e-3,
            attached=attached,
            gates=None,
            extra_loss=None,
            asked=Request.NOTHING,
        )

    def timed(action: Callable[[], Any]) -> float:
        distributed.barrier()
        begin = time.perf_counter()
        action()
        distributed.barrier()
        return time.perf_counter() - begin

    def plain(*, flush: bool) -> None:
        own, folder = engine._engine.checkpoint_engine, root / "plain"
        engine._engine.checkpoint_engine = TorchCheckpointEngine()
        engine._engine.checkpoint_engine.zipfile_serialization = True
        engine._engine.save_checkpoint(str(folder), tag="plain")
        engine._engine.checkpoint_engine = own
        for path in folder.rglob("*.pt") if flush and distributed.rank() == 0 else ():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

    def clear() -> None:
        distributed.barrier()
        if distributed.rank() == 0:
            shutil.rmtree(root, ignore_errors=True)
        os.sync()  # what one way has left to be written must not be charged to the next
        distributed.barrier()

    measured: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        measured.setdefault(name, []).append(seconds)

    def save(position: Position) -> None:
        with Saver(root / "checkpoints", stage="bench", fingerprint="f", keep=1) as saver:
            begin = time.perf_counter()
            note("stall", timed(lambda: saver.save(engine, None, position, also=lambda: None)))
            saver.wait()
            distributed.barrier()
            note("published", time.perf_counter() - begin)
            clear()
            saver.save(engine, None, position, also=lambda: None)
            note("beside", timed(lambda: [step() for _ in range(steps)]) / steps)

    def resume() -> int:
        note("verify", timed(lambda: find_checkpoint(root / "checkpoints", "auto")))
        found, fresh = find_checkpoint(root / "checkpoints", "auto"), new_engine()
        assert found is not None
        note("load", timed(lambda: load_checkpoint(*found, fresh, None, fingerprint="f")))
        note("reshard", timed(lambda: fresh.load_resharded(found[0])))
        fresh.close()
        return sum(entry["size"] for entry in found[1]["files"].values())

    for _ in range(3):
        step()
    steps = max(2, round(1.0 / timed(step)))
    for number in range(options.repeats):
        for name, flush in (("plain", False), ("flushed", True)):
            clear()
            note(name, timed(lambda flush=flush: plain(flush=flush)))
        clear()
        note("alone", timed(lambda: [step() for _ in range(steps)]) / steps)
        save(Position(step=number, updates=number, tokens=1))
        size = resume()
    clear()
    if distributed.rank() == 0:
        medians = {name: statistics.median(values) for name, values in measured.items()}
        print(json.dumps(medians | {"bytes": size}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to write: the disk that is measured (default: the temporary folder)")
    parser.add_argument("--dim", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output")
    options = parser.parse_args()
    if options.dim is not None:
        return worker(options)
    rows = []
    for dim in options.dims:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            same = ["--zero", str(options.zero), "--precision", options.precision, "--repeats", str(options.repeats)]
            got = run_ranks([__file__, "--dim", str(dim), "--folder", f"{folder}/saves", *same])
        rows.append(
            {
                "MiB": got["bytes"] / 2**20,
                "plain s": got["plain"],
                "stall / plain": got["stall"] / got["plain"],
                "published / plain": got["published"] / got["plain"],
                "published / plain, flushed": got["published"] / got["flushed"],
                "stall s": got["stall"],
                "steps beside / alone": got["beside"] / got["alone"],
                "verify s": got["verify"],
                "load s": got["load"],
                "resume s a GiB": (got["verify"] + got["load"]) / got["bytes"] * 2**30,
                "resharded load s": got["reshard"],
            }
        )
    settings = {"ranks": 2, "ZeRO": options.zero, "precision": options.precision, "repeats": options.repeats}
    publish("checkpoint_cost", settings, rows, options.output)


if __name__ == "__main__":
    main()
