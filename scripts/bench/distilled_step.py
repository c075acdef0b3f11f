"""What distillation costs where masks are learned on frozen weights: the time of a step with the model as its own
teacher over the plain steps, with frozen and with trained weights.

    python scripts/bench/distilled_step.py [--model HF_FOLDER | --shape default|1b] [--kind heads] [--zero 0] [--rows 8]

Two engines on the same weights, one of them frozen, and one batch; the variants take turns and medians are compared.
Distillation is the divergence of the logits, and beside it the hidden states of the last norm and all attention blocks.
Also the share of the machine's matrix rate that steps without a teacher reach.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, publish
from gated_step import SHAPES, batch_of, gates_of, matrix_rate, model_config

from cook.base.device import wait_for
from cook.base.signals import Request
from cook.config.types import TrainingConfig
from cook.distill.distiller import Distiller
from cook.distill.taps import Pair, Place
from cook.families.registry import by_config
from cook.families.source import open_model, unfilled_model
from cook.pruning.attach import AttachedGates
from cook.pruning.counts import forward_flops
from cook.recipe.distillation import own_teacher
from cook.training.engine import Engine, initialise_processes
from cook.training.step import train_step

VARIANTS = ("plain, trained", "plain", "gated", "distilled", "distilled, states")
"""All but the first with frozen weights."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder, in place of a shape")
    parser.add_argument("--shape", choices=SHAPES, default="default")
    parser.add_argument("--kind", choices=("layer", "heads", "dimff"), default="heads")
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--name", default="distilled_step")
    parser.add_argument("--output")
    return parser.parse_args()


def opened(options: argparse.Namespace) -> tuple[Any, dict[str, Any], Any]:
    """Adapter, config and weights; without a folder all engines draw the same fresh ones."""
    if options.model:
        source = open_model(options.model)
        return source.adapter, source.config, source.tensors
    adapter, config = by_config({}), model_config(options.shape)
    torch.manual_seed(0)
    return adapter, config, {name: p.detach() for name, p in adapter.build(config).named_parameters()}


def places(space: Any, model: torch.nn.Module) -> tuple[list[Pair], list[Pair]]:
    """The last norm, and the last product of every attention block."""
    norm = [name for name, _ in model.named_modules() if "norm" in name][-1]
    out = [group.gate.module for group in space.of("layer", "att")]
    return (*[[Pair(Place("post", path), Place("post", path)) for path in some] for some in ([norm], out)],)


def main() -> None:
    options = arguments()
    initialise_processes(None)
    adapter, config, weights = opened(options)
    space = adapter.space(config)
    engines = {}
    for trained in (True, False):
        training = TrainingConfig(
            steps=1000,
            train_batch_size=options.rows,
            micro_batch_size=options.rows,
            learning_rate=1e-5,
            precision=options.precision,
            activation_checkpointing=options.checkpointing,
            train_weights=trained,
        )
        settings = {"zero_optimization": {"stage": options.zero}}
        build = lambda: unfilled_model(adapter, config)  # noqa: E731
        engines[trained] = Engine(build, weights, training, settings, call_form=adapter.inputs, on_host=adapter.on_host)
    batch = batch_of({"prompt_length": 1} | config, options.rows, options.length)
    num_targets = int((batch["targets"] != -100).sum())
    groups, bank = gates_of(space, options.kind)
    rate = matrix_rate(engines[True])
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    peaks = dict.fromkeys(VARIANTS, 0.0)
    for repeat in range(options.repeats + 2):
        for name in VARIANTS:
            engine = engines[name == "plain, trained"]
            gated = not name.startswith("plain")
            attached = AttachedGates(engine.module, groups if gated else [], {})
            distiller = None
            if name.startswith("distilled"):
                hidden, attention = places(space, engine.module) if "states" in name else ([], [])
                distiller = Distiller(
                    engine.module,
                    own_teacher(engine, attached, fixed=True),
                    ce_scale=1.0,
                    ce_temp=1.0,
                    mse_hidn_scale=1.0,
                    hidden_pairs=hidden,
                    mse_att_scale=1.0,
                    attention_pairs=attention,
                )
            wait_for(engine.device)
            start = time.perf_counter()
            train_step(
                engine,
                [batch],
                repeat + 1,
                num_targets=num_targets,
                learning_rate=1e-5,
                attached=attached,
                gates=bank if gated else None,
                extra_loss=distiller,
                asked=Request.NOTHING,
            )
            wait_for(engine.device)
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
            attached.remove()
            if distiller:
                distiller.remove()
            if engine.device.type != "cpu":
                peaks[name] = torch.accelerator.max_memory_allocated() / 2**30
                torch.accelerator.reset_peak_memory_stats()

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))

    # Frozen weights have no gradient, but their inputs do.
    forward = options.rows * options.length * forward_flops(space, context=options.length)
    flops = {"plain, trained": 3 * forward, "plain": 2 * forward, "gated": 2 * forward}
    rows = [
        {
            "step": name,
            "seconds": statistics.median(times[name]),
            "/ plain": ratio(name, "plain"),
            "/ plain, trained": ratio(name, "plain, trained"),
            "share of matrix rate": flops[name] / statistics.median(times[name]) / rate if name in flops else None,
            "peak GiB": peaks[name] or None,
        }
        for name in VARIANTS
    ]
    settings = vars(options) | {"precision": engines[False].precision, "matrix TFLOP/s": rate / 1e12, **machine()}
    settings["model"] = options.model and Path(options.model).name
    publish(options.name, settings, rows, options.output)


if __name__ == "__main__":
    main()
