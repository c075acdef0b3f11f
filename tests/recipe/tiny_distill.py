"""Distillation on real engines, many cases in one process group, and in plain PyTorch as the oracle.

`python … tiny_distill.py CASES.json OUT`: every rank writes `OUT.<rank>` with what came of each case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cook.base import distributed
from cook.base.seeds import generator
from cook.distill.distiller import Distiller, model_teacher, stream_weights
from cook.distill.taps import read_pair
from cook.distill.teacher_loss import LEARNING_RATE, Projections
from cook.families.cpm_ant import ADAPTER
from cook.pruning.attach import AttachedGates
from cook.recipe.distillation import own_teacher
from cook.training.engine import Engine, initialise_processes
from tests.training import tiny_training as tiny

SCALES = {"ce_scale": 0.7, "ce_temp": 2.0, "mse_hidn_scale": 0.3, "mse_att_scale": 0.4}
HIDDEN = ("[post]encoder.layers.0:[post]encoder.layers.0", "[pre]encoder.output_layernorm:[post]encoder.layers.1")
ATTENTION = ("[post]encoder.layers.1.self_att.self_attention:[post]encoder.layers.1.self_att.self_attention",)
WIDE = {**tiny.CONFIG, "dim_model": 30, "num_layers": 2}
"""A teacher whose hidden states are wider than the student's."""
SEED = 11


def wide_teacher() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return ADAPTER.build(WIDE).eval()


def same_teacher() -> torch.nn.Module:
    """A second copy of the student's first weights."""
    model = tiny.build()
    model.load_state_dict(tiny.weights())
    return model.eval()


def distil(case: dict[str, Any]) -> Any:
    """`teacher`: "self", "copy", "streamed" or "wide"; `dropout` of the student, which no teacher has."""

    def make(engine: Engine, attached: AttachedGates) -> Distiller:
        kind = case["teacher"]
        if kind == "self":
            teacher = own_teacher(engine, attached, fixed=True)
        else:
            model = (wide_teacher() if kind == "wide" else same_teacher()).to(engine.dtype)
            if kind == "streamed":
                stream_weights(model, engine.device)
            teacher = model_teacher(model)
        for module in engine.module.modules() if "dropout" in case else ():
            if isinstance(module, torch.nn.Dropout):
                module.p = case["dropout"]
        torch.manual_seed(5)
        wide = kind == "wide"
        return Distiller(
            engine.module,
            teacher,
            **(SCALES | ({"mse_att_scale": 0.0} if wide else {})),
            hidden_pairs=[read_pair(pair) for pair in HIDDEN],
            attention_pairs=[] if wide else [read_pair(pair) for pair in ATTENTION],
            projections=Projections(seed=SEED) if wide else None,
        )

    return make


class Oracle:
    """The same losses written anew: hooks that keep all they see, formulas in float64 over single positions."""

    def __init__(self, student: torch.nn.Module, teacher: torch.nn.Module):
        self.teacher, self.seen = teacher, ({}, {})
        for model, seen in zip((student, teacher), self.seen, strict=True):
            for name, module in model.named_modules():
                module.register_forward_hook(
                    lambda _m, inputs, output, seen=seen, name=name: seen.update({name: (inputs, output)})
                )
        wide = teacher.config.dim_model != student.config.dim_model
        self.maps, self.scales = {}, SCALES | ({"mse_att_scale": 0.0} if wide else {})
        if wide:
            for pair in HIDDEN:
                start = torch.randn(30, 24, generator=generator(SEED, "projection", pair)) / 24**0.5
                self.maps[pair] = start.requires_grad_()
        self.optimizer = torch.optim.Adam(list(self.maps.values()), lr=LEARNING_RATE) if wide else None

    def state(self, who: int, place: str) -> torch.Tensor:
        when, _, name = place[1:].partition("]")
        inputs, output = self.seen[who][name]
        return (inputs[0] if when == "pre" else output).double()

    def __call__(self, batch: dict[str, Any], targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = self.teacher(**batch).logits
        told, temperature = targets != -100, self.scales["ce_temp"]
        p = (wanted.double() / temperature).softmax(-1)[told]
        q = (logits.double() / temperature).softmax(-1)[told]
        loss = self.scales["ce_scale"] * temperature**2 * (p * (p.log() - q.log())).sum()
        for scale, pairs in ((self.scales["mse_hidn_scale"], HIDDEN), (self.scales["mse_att_scale"], ATTENTION)):
            for pair in pairs if scale else ():
                mine, its = (self.state(who, place)[told] for who, place in enumerate(pair.split(":")))
                mine = mine @ self.maps[pair].double().T if pair in self.maps else mine
                loss = loss + scale * ((mine - its) ** 2).sum() / its.shape[-1]
        return loss.float()

    def step(self) -> None:
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


def main() -> None:
    initialise_processes(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {name: tiny.engine_run(case, distil(case)) for name, case in cases.items()}
    torch.save(results, f"{sys.argv[2]}.{distributed.rank()}")


if __name__ == "__main__":
    main()
