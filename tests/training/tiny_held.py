"""Held zeros on real engines, for `test_zero.py`: `python … tiny_held.py CASES.json OUT.pt`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cook.base import distributed
from cook.base.signals import Request
from cook.training.engine import Engine, initialise_processes
from cook.training.step import train_step
from tests.training import tiny_training as tiny

TRAINING = dataclasses.replace(tiny.TRAINING, weight_decay=0.3, clip=0.5)
STALE = 2
"""Steps without masks, so that the moments are not 0 when the masks come."""


def masks() -> dict[str, torch.Tensor]:
    """Random masks of all matrices of the layers, odd sizes of shards included."""
    generator = torch.Generator().manual_seed(11)
    return {
        name: torch.rand(tensor.shape, generator=generator) > 0.6
        for name, tensor in tiny.weights().items()
        if tensor.dim() == 2 and ".layers." in name
    }


def moments(engine: Engine, names: list[str]) -> dict[str, torch.Tensor]:
    """Adam's first moment of whole parameters, through DeepSpeed's own reader (the parameter's state at stage 0)."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found, parameters = {}, dict(engine.module.named_parameters())
    for name in names:
        value = safe_get_full_optimizer_state(parameters[name], "exp_avg")
        found[name] = value if value is not None else engine._optimizer.state[parameters[name]]["exp_avg"]
    return {name: value.float().cpu().clone() for name, value in found.items()}


def held_run(case: dict[str, Any]) -> dict[str, Any]:
    """A case: `zero`, `precision`, `from_start` or masks after STALE steps, `micro`, `drifting`, `save` or `load`."""
    training = dataclasses.replace(TRAINING, precision=case["precision"], micro_batch_size=case["micro"])
    deepspeed = {"zero_optimization": {"stage": case["zero"]}}
    engine = Engine(tiny.build, tiny.weights(), training, deepspeed)
    chosen, names = masks(), sorted(masks())
    first = {}

    def read() -> None:
        first.update(first or {name: g.clone() for name, g in engine.full_gradients(names)})

    engine.on_gradients = read
    if case.get("from_start"):
        engine.hold_zeros(chosen, gradients_only=case.get("drifting", False))
    if "load" in case:
        engine.load(Path(case["load"]))
    rank, world, norms = distributed.rank(), distributed.world_size(), []
    for step in range(case.get("first", 1), case.get("last", tiny.STEPS) + 1):
        if step == STALE + 1 and not case.get("from_start"):
            engine.hold_zeros(chosen)
        train_step(
            engine,
            tiny.Batches().micro_batches(step - 1, rank, world, training.micro_batch_size),
            step,
            num_targets=tiny.Batches().num_targets(step - 1),
            learning_rate=0.02,
            attached=None,
            gates=None,
            extra_loss=None,
            asked=Request.NOTHING,
        )
        norms.append(engine.gradient_norm())
    if "save" in case:
        engine.save(Path(case["save"]))
    result = {
        "weights": {name: tensor.clone() for name, tensor in engine.full_weights()},
        "working": {name: p.detach().float().clone() for name, p in engine.module.named_parameters() if p.numel()},
        "moments": moments(engine, names),
        "gradients": first,
        "norms": norms,
    }
    engine.close()
    return result


def main() -> None:
    initialise_processes(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {name: held_run(case) for name, case in cases.items()}
    torch.save(results, f"{sys.argv[2]}.{distributed.rank()}")


if __name__ == "__main__":
    main()
