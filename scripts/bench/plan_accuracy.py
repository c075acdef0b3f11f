"""How good a plan is: predicted and measured peak memory, communication and step time of two CPU ranks.

    OMP_WAIT_POLICY=PASSIVE python scripts/bench/plan_accuracy.py [--only TEXT] [--steps 5]

Two ranks over gloo, one thread each. Memory is the peak resident memory of rank 0 above its memory before the model is
built, after a tiny model has had every library load what it needs; glibc returns freed memory at once, so that it does
not count. Communication is counted where DeepSpeed calls torch. Times are medians of rank 0's
processor time, which other processes on the machine change little, against the plan without communication. The rates
that the plan needs are measured between the steps, by the same processes.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from common import publish, run_ranks
from gated_step import SHAPES, batch_of

from cook.base import distributed
from cook.base.signals import Request
from cook.config.types import TrainingConfig
from cook.evaluation.speed import PeakMemory
from cook.families.registry import by_config
from cook.pruning.attach import AttachedGates
from cook.recipe.cards import probe
from cook.recipe.estimate import Card, Setup, estimate, memory_of
from cook.recipe.model_shape import shape_of
from cook.training.engine import Engine, initialise_processes
from cook.training.step import train_step

LLAMA = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
MODELS: dict[str, dict[str, Any]] = {
    "CPM-Ant, default": SHAPES["default"] | {"model_type": "cook_cpm_ant"},
    "SmolLM2-135M, 4 layers": LLAMA,
}
TINY: dict[str, dict[str, Any]] = {
    "CPM-Ant, default": MODELS["CPM-Ant, default"] | {"num_layers": 1, "vocab_size": 512, "dim_ff": 64},
    "SmolLM2-135M, 4 layers": LLAMA | {"num_hidden_layers": 1, "vocab_size": 512, "intermediate_size": 64},
}
KEYS = ("model", "rows", "zero", "precision", "checkpointing", "batch", "offloaded")
CASES = [
    dict(zip(KEYS, values, strict=True))
    for values in (
        ("CPM-Ant, default", 8, 0, "fp32", False, 16, ()),
        ("CPM-Ant, default", 8, 0, "fp32", True, 16, ()),
        ("CPM-Ant, default", 4, 2, "fp32", False, 16, ()),
        ("CPM-Ant, default", 8, 3, "fp32", False, 16, ()),
        ("CPM-Ant, default", 4, 2, "bf16", False, 8, ()),
        ("SmolLM2-135M, 4 layers", 4, 0, "fp32", False, 8, ()),
        ("SmolLM2-135M, 4 layers", 4, 2, "fp32", True, 8, ()),
        ("SmolLM2-135M, 4 layers", 4, 3, "fp32", False, 8, ()),
        ("SmolLM2-135M, 4 layers", 2, 3, "bf16", True, 4, ()),
        ("SmolLM2-135M, 4 layers", 2, 2, "bf16", True, 4, ("offload_optimizer",)),
        ("SmolLM2-135M, 4 layers", 2, 3, "bf16", True, 4, ("offload_optimizer",)),
        ("SmolLM2-135M, 4 layers", 2, 3, "bf16", True, 4, ("offload_optimizer", "offload_param")),
    )
]
LENGTH = 256


def engine_of(config: dict[str, Any], case: dict[str, Any], rows: int, batch: int) -> Engine:
    adapter = by_config(config)
    training = TrainingConfig(
        steps=1000,
        train_batch_size=batch,
        micro_batch_size=rows,
        learning_rate=1e-4,
        precision=case["precision"],
        activation_checkpointing=case["checkpointing"],
    )
    offloaded = {key: {"device": "cpu"} for key in case["offloaded"]}
    settings = {"zero_optimization": {"stage": case["zero"]} | offloaded}
    return Engine(lambda: adapter.build(config), None, training, settings, call_form=adapter.inputs)


def step_of(engine: Engine, config: dict[str, Any], rows: int, number: int) -> None:
    batch = batch_of({"prompt_length": 1} | config, rows, LENGTH)
    train_step(
        engine,
        [dict(batch) for _ in range(engine.accumulation)],
        number,
        num_targets=rows * LENGTH,
        learning_rate=1e-4,
        attached=AttachedGates(engine.module, [], {}),
        gates=None,
        extra_loss=None,
        asked=Request.NOTHING,
    )


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Bytes that a rank would send with ring algorithms, by collective of DeepSpeed's backend."""
    backend = importlib.import_module("deepspeed.comm.comm").cdb
    sent: dict[str, float] = {}
    ring = (distributed.world_size() - 1) / distributed.world_size()
    whole: dict[str, Callable[[Any, Any], float]] = {
        "all_reduce": lambda tensor, _: 2 * tensor.nbytes,
        "all_reduce_coalesced": lambda tensors, _: 2 * sum(t.nbytes for t in tensors),
        "all_gather_into_tensor": lambda output, _: output.nbytes,
        "all_gather": lambda outputs, _: sum(t.nbytes for t in outputs),
        "all_gather_coalesced": lambda outputs, _: sum(t.nbytes for t in outputs),
        "reduce_scatter_tensor": lambda _, source: source.nbytes,
        "reduce_scatter": lambda _, sources: sum(t.nbytes for t in sources),
        "broadcast": lambda tensor, _: tensor.nbytes,
        "reduce": lambda tensor, _: tensor.nbytes,
    }
    originals = {name: getattr(backend, name) for name in whole}

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            named = [*args, *options.values(), None]
            sent[name] = sent.get(name, 0) + ring * whole[name](named[0], named[1])
            return originals[name](*args, **options)

        return call

    for name in whole:
        setattr(backend, name, watched(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(backend, name, original)


def keep_freed_memory(keeps: bool) -> None:
    """Has glibc return blocks above 128 KiB to the system at once, or keep what it would keep in the long run.

    Activations in bf16 are blocks of half a MiB here; freed ones that glibc keeps would count as the step's memory.
    """
    libc, mmap_threshold, trim_threshold = ctypes.CDLL(None), -3, -1
    libc.mallopt(mmap_threshold, 2**25 if keeps else 2**17)
    libc.mallopt(trim_threshold, 2**26 if keeps else 2**17)


def worker(case: dict[str, Any], steps: int) -> None:
    initialise_processes(1)
    config = MODELS[case["model"]]
    rows, batch = case["rows"], case["batch"]
    warm = engine_of(TINY[case["model"]], case, 1, distributed.world_size())
    for number in (1, 2):
        step_of(warm, TINY[case["model"]], 1, number)
    warm.close()
    del warm
    keep_freed_memory(False)
    with PeakMemory(torch.device("cpu")) as peak:
        engine = engine_of(config, case, rows, batch)
        step_of(engine, config, rows, 1)
        with counted() as sent:
            step_of(engine, config, rows, 2)
    keep_freed_memory(True)
    setup, times = setup_of(case), []
    shape = shape_of(by_config(config).space(config), score_bias="prompt_length" in config)
    cards = []
    for number in range(steps):
        distributed.barrier()
        cards.append(probe(shape, setup, budget=0.2, clock=time.process_time))
        distributed.barrier()
        start = time.process_time()
        step_of(engine, config, rows, number + 3)
        times.append(time.process_time() - start)
    if not steps:
        if distributed.rank() == 0:
            print(json.dumps({"peak": peak.bytes, "sent": sum(sent.values()), "calls": sent}))
        return
    card = asdict(cards[0])
    numbers = ("half", "single", "bandwidth", "update", "copies", "loss", "attention")
    card |= {"link": 1e30, "latency": 0}
    card |= {key: statistics.median(getattr(one, key) for one in cards) for key in numbers}
    if distributed.rank() == 0:
        found = {"peak": peak.bytes, "seconds": statistics.median(times), "card": card}
        print(json.dumps(found | {"sent": sum(sent.values()), "calls": sent}))
    distributed.barrier()


def setup_of(case: dict[str, Any]) -> Setup:
    return Setup(
        zero=case["zero"],
        half=case["precision"] != "fp32",
        ranks=2,
        rows=case["rows"],
        length=LENGTH,
        accumulation=case["batch"] // case["rows"] // 2,
        checkpointing=case["checkpointing"],
        offload_optimizer="offload_optimizer" in case["offloaded"],
        offload_param="offload_param" in case["offloaded"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="rows whose description contains this text")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output")
    options = parser.parse_args()
    if options.worker is not None:
        return worker(json.loads(options.worker), options.steps)
    rows = []
    for case in CASES:
        if options.only not in json.dumps(case):
            continue
        found = run_ranks([__file__, "--worker", json.dumps(case), "--steps", str(options.steps)])
        config = MODELS[case["model"]]
        shape = shape_of(by_config(config).space(config), score_bias="prompt_length" in config)
        setup = setup_of(case)
        plan = estimate(shape, setup, Card(**found["card"]) if options.steps else None)
        peak = memory_of(shape, setup, shared=True).peak
        rows.append(
            case
            | {
                "MiB": found["peak"] / 2**20,
                "plan MiB": peak / 2**20,
                "memory ratio": peak / found["peak"],
                "sent MiB": found["sent"] / 2**20,
                "plan sent MiB": plan.sent / 2**20,
                "CPU seconds": found.get("seconds"),
                "plan seconds": plan.seconds,
                "time ratio": plan.seconds and plan.seconds / found["seconds"],
            }
        )
        print(json.dumps(rows[-1] | {"calls": found["calls"], "card": found.get("card")}), flush=True)
    publish("plan_accuracy", {"ranks": 2, "threads": 1, "length": LENGTH}, rows, options.output)


if __name__ == "__main__":
    main()
