"""Short runs of a Llama whose weights fill several blocks of a disk, for `test_nvme.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cook.base import distributed
from cook.base.signals import Request
from cook.config.types import TrainingConfig
from cook.families.registry import by_config
from cook.pruning.attach import AttachedGates
from cook.pruning.controller import Constraint
from cook.pruning.gates import Gates
from cook.training.engine import Engine, initialise_processes
from cook.training.step import train_step

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 2048, "hidden_size": 512}
CONFIG |= {"intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 8, "tie_word_embeddings": True}
STEPS, ROWS, LENGTH = 4, 2, 32


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 2048, (STEPS, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    position, rest = torch.arange(LENGTH).expand(ROWS, -1), torch.zeros(ROWS, LENGTH, dtype=torch.long)
    shared = {"length": torch.full((ROWS,), LENGTH), "context": rest.bool(), "position": position, "span": rest}
    return [{"input": i[:, :-1], "targets": i[:, 1:], "segment": rest + 2, **shared} for i in ids]


def run_of(case: dict[str, Any]) -> dict[str, Any]:
    """Losses, gates and weights of a run; `halved`: with another engine from half of its steps on.

    `train_weights` and `zero_optimization` are the case's.
    """
    adapter = by_config(CONFIG)
    training = TrainingConfig(
        steps=STEPS,
        train_batch_size=ROWS,
        micro_batch_size=1,
        learning_rate=1e-3 if case["train_weights"] else 0.0,
        train_weights=case["train_weights"],
        precision="fp32",
    )
    # The same weights in every case; a Llama's own initialisation would draw other ones.
    torch.manual_seed(0)
    weights = {name: tensor.detach().clone() for name, tensor in adapter.build(CONFIG).named_parameters()}
    settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **case["zero_optimization"]}}
    groups = adapter.space(CONFIG).of("dimff")
    constraints = [
        Constraint(name=g.name, start=n * g.size, costs=(1 / g.size,) * g.size, target=0.5)
        for n, g in enumerate(groups)
    ]
    gates = Gates({g.name: g.size for g in groups}, constraints, steps=STEPS, seed=0)
    losses, on_disk, folder = list[float](), 0, Path(case["folder"])
    halves = [range(STEPS // 2), range(STEPS // 2, STEPS)] if case.get("halved") else [range(STEPS)]
    for half in halves:
        engine = Engine(lambda: adapter.build(CONFIG), weights, training, settings, call_form=adapter.inputs)
        if half.start:
            engine.load(folder / "checkpoint")
        attached = AttachedGates(engine.module, groups, {})
        losses += [one_step(engine, training, attached, gates, number) for number in half]
        on_disk = sum(file.stat().st_size for file in folder.glob("zero_stage_3/**/*") if file.is_file())
        if half.stop < STEPS:
            engine.save(folder / "checkpoint")
        found = {name: tensor.clone() for name, tensor in engine.full_weights()}
        attached.remove()
        engine.close()
    return {"losses": losses, "gates": gates.values, "weights": found, "on disk": on_disk}


def one_step(engine: Engine, training: TrainingConfig, attached: AttachedGates, gates: Gates, number: int) -> float:
    rank = distributed.rank()
    result = train_step(
        engine,
        [{name: value[rank : rank + 1] for name, value in batches()[number].items()}],
        number + 1,
        num_targets=ROWS * LENGTH,
        learning_rate=training.learning_rate,
        attached=attached,
        gates=gates,
        extra_loss=None,
        asked=Request.NOTHING,
    )
    assert result.applied
    return result.loss


def main() -> None:
    initialise_processes(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    torch.save({name: run_of(case) for name, case in cases.items()}, f"{sys.argv[2]}.{distributed.rank()}")


if __name__ == "__main__":
    main()
