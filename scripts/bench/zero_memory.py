"""Bytes of model state a rank at ZeRO 1, 2 and 3 on two ranks, against the theory.

    python scripts/bench/zero_memory.py

Two CPU processes; counted are the tensors that live in a rank after a step: weights, gradients, masters and moments.
Theory (Rajbhandari et al. 2020, ZeRO, sec. 3.1) for fp32 masters and Adam: bf16 keeps 2 bytes of weights, 2 of
gradients and 12 of states a parameter; stage 1 shares out the states, 2 the gradients too, 3 the weights too. Between
steps the engine lets gradients go at stages 1 and 2, so less than the theory lives then.
"""

from __future__ import annotations

import argparse
import gc
import json

import torch
from common import publish, run_ranks


def worker(stage: int, precision: str) -> None:
    from gated_step import SHAPES, batch_of

    from cook.base import distributed
    from cook.base.signals import Request
    from cook.config.types import TrainingConfig
    from cook.families.registry import by_config
    from cook.pruning.attach import AttachedGates
    from cook.training.engine import Engine, initialise_processes
    from cook.training.step import train_step

    initialise_processes(1)
    config = SHAPES["default"] | {"model_type": "cook_cpm_ant"}
    adapter = by_config({})
    training = TrainingConfig(
        steps=10,
        train_batch_size=2,
        micro_batch_size=1,
        learning_rate=1e-3,
        precision=precision,  # type: ignore[arg-type]
    )
    # Buckets are buffers of the engine, not state: small ones, as large ones would drown a model of this size.
    zero = {
        "stage": stage,
        "reduce_bucket_size": 100_000,
        "allgather_bucket_size": 100_000,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
    gc.collect()
    before = live_bytes()
    engine = Engine(lambda: adapter.build(config), None, training, {"zero_optimization": zero})
    batch = batch_of(config, 1, 32)
    for step in (1, 2):
        train_step(
            engine,
            [dict(batch)],
            step,
            num_targets=46,
            learning_rate=1e-3,
            attached=AttachedGates(engine.module, [], {}),
            gates=None,
            extra_loss=None,
            asked=Request.NOTHING,
        )
    gc.collect()
    count = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    if distributed.rank() == 0:
        print(json.dumps({"bytes": live_bytes() - before, "parameters": count}))


def live_bytes() -> int:
    """Bytes of all distinct storages that tensors of this process refer to."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type != "meta":
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--output")
    options = parser.parse_args()
    if options.worker is not None:
        return worker(options.worker, options.precision)
    rows = []
    for stage in (1, 2, 3):
        measured = run_ranks([__file__, "--worker", str(stage), "--precision", options.precision])
        weights, gradients, states = 2, 2, 12
        shared = [states if stage >= 1 else 0, gradients if stage >= 2 else 0, weights if stage >= 3 else 0]
        theory = (weights + gradients + states - sum(shared) + sum(shared) / 2) * measured["parameters"]
        rows.append(
            {
                "ZeRO": stage,
                "MiB a rank": measured["bytes"] / 2**20,
                "theory MiB": theory / 2**20,
                "measured / theory": measured["bytes"] / theory,
            }
        )
    publish("zero_memory", {"ranks": 2, "precision": options.precision}, rows, options.output)


if __name__ == "__main__":
    main()
