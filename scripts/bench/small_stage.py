"""Finetuning with fixed masks: the speed of training the smaller model, against the masked one and the dense one.

    python scripts/bench/small_stage.py [--model FOLDER] [--precision auto] [--length 256] [--rows 8]

Without a model, the default recipe's CPM-Ant with its sizes: half of the FFN blocks, a quarter of the heads and half of
the FFN dimensions stay. Of another model, `--heads` and `--dims` stay of every block. One engine per form; the forms
take turns, and medians are compared. The measure is how much of the saved operations becomes saved time: the ratio of
the speeds over the ratio of the FLOPs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine, publish
from gated_step import batch_of, model_config

from cook.base.device import wait_for
from cook.base.signals import Request
from cook.config.types import TrainingConfig
from cook.families.registry import by_config
from cook.families.source import open_model, unfilled_model
from cook.pruning.attach import AttachedGates
from cook.pruning.counts import forward_flops, parameters
from cook.pruning.mask_set import kept_counts
from cook.recipe.compact import cut_inputs
from cook.recipe.inputs import Inputs
from cook.training.engine import Engine, initialise_processes
from cook.training.step import train_step

FORMS = ("dense", "masked", "small")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--heads", type=float, default=2 / 3, help="share of the heads (key-value groups) of a block")
    parser.add_argument("--dims", type=float, default=0.5, help="share of the FFN dimensions of a block")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--name", default="small_stage")
    parser.add_argument("--output")
    return parser.parse_args()


def masked_inputs(options: argparse.Namespace) -> Inputs:
    """The whole model with masks of the wanted sizes; which units go does not matter for the speed."""
    if options.model:
        source = open_model(options.model)
        adapter, config, weights = source.adapter, source.config, source.tensors
        kept = {"layer": 1.0, "heads": options.heads, "dimff": options.dims}
    else:
        adapter, config = by_config({}), model_config("default")
        weights = adapter.build(config).state_dict()
        kept = {"layer": 1.0, "heads": 4 / 16, "dimff": 350 / 700}
    space = adapter.space(config)
    masks = {}
    for group in space.groups:
        count = round(kept[group.kind] * group.size)
        masks[group.name] = (torch.arange(group.size) < count).float()
        if not options.model and group.kind == "layer" and group.site == "ffn":
            masks[group.name] = torch.tensor([float(group.layer % 2)])
    return Inputs(
        adapter=adapter,
        model_config=config,
        weights=weights,
        origin="",
        folder=None,
        head_unit="kv_group",
        space=space,
        fixed=masks,
        learned=(),
    )


def engine_of(inputs: Inputs, training: TrainingConfig) -> Engine:
    """A training engine of one form of the model."""

    call_form, build = inputs.adapter.inputs, partial(unfilled_model, inputs.adapter, inputs.model_config)
    return Engine(build, inputs.weights, training, {"zero_optimization": {"stage": 0}}, call_form=call_form)


def main() -> None:
    options = arguments()
    initialise_processes(None)
    whole = masked_inputs(options)
    small = cut_inputs(whole)
    training = TrainingConfig(
        steps=1000,
        train_batch_size=options.rows,
        micro_batch_size=options.rows,
        learning_rate=1e-4,
        precision=options.precision,
    )
    engines = {form: engine_of(small if form == "small" else whole, training) for form in FORMS}
    masked = [group for group in whole.space.groups if group.name in whole.fixed]
    gates = {form: AttachedGates(engine.module, [], {}) for form, engine in engines.items()}
    gates["masked"] = AttachedGates(engines["masked"].module, masked, whole.fixed)
    prompt = {"prompt_length": whole.model_config.get("prompt_length", 0)}
    batch = batch_of(dict(whole.model_config) | prompt, options.rows, options.length)
    num_targets = int((batch["targets"] != -100).sum())
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for repeat in range(options.repeats + 2):
        for form in FORMS:
            start = time.perf_counter()
            train_step(
                engines[form],
                [batch],
                repeat + 1,
                num_targets=num_targets,
                learning_rate=1e-4,
                attached=gates[form],
                gates=None,
                extra_loss=None,
                asked=Request.NOTHING,
            )
            wait_for(engines[form].device)
            if repeat >= 2:
                times[form].append(time.perf_counter() - start)
    publish(options.name, vars(options) | machine(), rows(options, whole, times), options.output)


def rows(options: argparse.Namespace, whole: Inputs, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row per form."""
    kept = kept_counts(whole.fixed)
    left = {form: kept if form == "small" else {} for form in FORMS}
    flops = {form: forward_flops(whole.space, left[form], context=options.length) for form in FORMS}
    found = []
    for form in FORMS:
        faster = statistics.median(a / b for a, b in zip(times["dense"], times[form], strict=True))
        fewer = flops["dense"] / flops[form]
        found.append(
            {
                "model": Path(options.model).name if options.model else "default",
                "form": form,
                "parameters": parameters(whole.space, left[form]),
                "tokens/s": round(options.rows * options.length / statistics.median(times[form])),
                "speed / dense": faster,
                "FLOPs of dense / its own": fewer,
                "speed ratio / FLOP ratio": faster / fewer,
            }
        )
    return found


if __name__ == "__main__":
    main()
