"""What learning a mask costs: the time of a training step with gates over one without, for each kind of mask.

    python scripts/bench/gated_step.py [--shape default|1b] [--zero 0] [--precision auto] [--length 256] [--rows 8]

One engine, one batch; the variants take turns and medians are compared. Also the share of the machine's matrix rate,
measured here by a large product in the same precision, and on a GPU the peak memory.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import machine, publish

from cook.base.device import wait_for
from cook.base.signals import Request
from cook.config.types import TrainingConfig
from cook.families.registry import by_config
from cook.pruning.attach import AttachedGates
from cook.pruning.controller import Constraint
from cook.pruning.counts import forward_flops, unit_parameters
from cook.pruning.gates import Gates
from cook.training.engine import Engine, initialise_processes
from cook.training.step import train_step

SHAPES = {
    "default": dict(
        vocab_size=4096, dim_model=256, num_layers=8, num_heads=16, dim_head=16, dim_ff=700, prompt_length=8
    ),
    "1b": dict(
        vocab_size=30720, dim_model=2048, num_layers=25, num_heads=16, dim_head=128, dim_ff=2816, prompt_length=32
    ),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="default")
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--name", default="gated_step")
    parser.add_argument("--output")
    return parser.parse_args()


def model_config(shape: str) -> dict:
    config = SHAPES[shape] | {"model_type": "cook_cpm_ant"}
    if shape == "1b":  # 25 attention and 21 FFN blocks
        config["mask_modules"] = [[False, layer in (3, 9, 15, 21)] for layer in range(25)]
    return config


def batch_of(config: dict, rows: int, length: int) -> dict[str, torch.Tensor]:
    prompt = config["prompt_length"]
    ids = torch.randint(10, config["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, :prompt] = torch.arange(prompt) + 2 * prompt
    text = (torch.arange(length) >= prompt).expand(rows, -1)
    targets = torch.where(text, ids.roll(-1, 1), -100)
    targets[:, -1] = -100
    return {
        "input": ids,
        "length": torch.full((rows,), length),
        "context": ~text,
        "position": torch.arange(length).expand(rows, -1),
        "segment": text * 2,
        "span": torch.zeros(rows, length, dtype=torch.long),
        "targets": targets,
    }


def gates_of(space, kind: str) -> tuple[list, Gates]:
    groups = [group for group in space.groups if group.kind == kind]
    if kind == "layer":
        sizes = [unit_parameters(space, group) for group in groups]
        made = [Constraint(name="blocks", start=0, costs=tuple(s / sum(sizes) for s in sizes), target=0.3)]
    else:
        starts = [sum(g.size for g in groups[:i]) for i in range(len(groups))]
        made = [
            Constraint(name=g.name, start=s, costs=(1 / g.size,) * g.size, target=0.5)
            for g, s in zip(groups, starts, strict=True)
        ]
    return groups, Gates({g.name: g.size for g in groups}, made, steps=1000, seed=0)


def matrix_rate(engine: Engine) -> float:
    """FLOP/s of a large product of the engine's precision."""
    on_cpu = engine.device.type == "cpu"
    size, repeats = (2048, 5) if on_cpu else (8192, 10)
    a = torch.randn(size, size, device=engine.device, dtype=torch.bfloat16 if engine.precision == "bf16" else None)
    times = []
    for _ in range(repeats + 2):
        wait_for(engine.device)
        start = time.perf_counter()
        a @ a
        wait_for(engine.device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:])


def main() -> None:
    options = arguments()
    initialise_processes(None)
    config = model_config(options.shape)
    adapter = by_config({})
    space = adapter.space(config)
    training = TrainingConfig(
        steps=1000,
        train_batch_size=options.rows,
        micro_batch_size=options.rows,
        learning_rate=1e-3,
        precision=options.precision,
        activation_checkpointing=options.checkpointing,
    )
    settings = {"zero_optimization": {"stage": options.zero}}
    engine = Engine(lambda: adapter.build(config), None, training, settings, on_host=adapter.on_host)
    batch = batch_of(config, options.rows, options.length)
    num_targets = int((batch["targets"] != -100).sum())
    rate = matrix_rate(engine)
    variants = ["plain", "layer", "heads", "dimff"]
    times: dict[str, list[float]] = {name: [] for name in variants}
    peaks = dict.fromkeys(variants, 0.0)
    gates = {name: gates_of(space, name) for name in variants[1:]}
    for repeat in range(options.repeats + 2):
        for name in variants:
            groups, bank = gates.get(name, ([], None))
            attached = AttachedGates(engine.module, groups, {})
            wait_for(engine.device)
            start = time.perf_counter()
            train_step(
                engine,
                [batch],
                repeat + 1,
                num_targets=num_targets,
                learning_rate=1e-3,
                attached=attached,
                gates=bank,
                extra_loss=None,
                asked=Request.NOTHING,
            )
            wait_for(engine.device)
            attached.remove()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
            if engine.device.type != "cpu":
                peaks[name] = torch.accelerator.max_memory_allocated() / 2**30
                torch.accelerator.reset_peak_memory_stats()
    tokens = options.rows * options.length
    flops = 3 * tokens * forward_flops(space, context=options.length)
    rows = []
    for name in variants:
        seconds = statistics.median(times[name])
        ratio = statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True))
        rows.append(
            {
                "step": name,
                "seconds": seconds,
                "gated / plain": ratio,
                "tokens/s": round(tokens / seconds),
                "share of matrix rate": flops / seconds / rate,
                "peak GiB": peaks[name] or None,
            }
        )
    settings = vars(options) | {"precision": engine.precision, "matrix TFLOP/s": rate / 1e12, **machine()}
    publish(options.name, settings, rows, options.output)


if __name__ == "__main__":
    main()
