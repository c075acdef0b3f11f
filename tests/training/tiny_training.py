"""A tiny model, gates and synthetic batches for the tests of training, and a plain PyTorch loop as the oracle.

Started as a script under a launcher, it runs a list of cases on real engines, all in one process group, and writes what
came of each: `python … tiny_training.py CASES.json OUT.pt`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cook.base import distributed
from cook.base.errors import UserError
from cook.base.signals import Request
from cook.config.types import TrainingConfig
from cook.families.cpm_ant import ADAPTER
from cook.pruning.attach import AttachedGates
from cook.pruning.controller import Constraint
from cook.pruning.gates import Gates
from cook.pruning.relaxation import HardConcrete
from cook.training.engine import Engine, initialise_processes
from cook.training.optim import learning_rate
from cook.training.step import Limits, train_step

CONFIG = dict(
    vocab_size=50,
    dim_model=24,
    num_layers=2,
    num_heads=4,
    dim_head=6,
    dim_ff=20,
    position_bias_num_buckets=16,
    position_bias_max_distance=32,
    prompt_types=3,
    prompt_length=3,
    segment_types=3,
    eps=1e-6,
)
ROWS, LENGTH = 4, 14
STEPS = 6
TRAINING = TrainingConfig(
    steps=STEPS,
    train_batch_size=ROWS,
    micro_batch_size=ROWS,
    learning_rate=0.02,
    warmup=0.25,
    precision="fp32",
    weight_decay=0.1,
    clip=0.5,
    threads=1,
)


def build() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return ADAPTER.build(CONFIG)


def weights(*, scrambled: bool = False) -> dict[str, torch.Tensor]:
    """Weights that bf16 cannot hold exactly, so that a lost fp32 master shows.

    Args:
        scrambled: Whether those of units that `fixed_masks` removes are others.
    """
    generator = torch.Generator().manual_seed(7)
    made = {n: torch.randn(p.shape, generator=generator) + ("norm" in n) for n, p in build().named_parameters()}
    for group in ADAPTER.space(CONFIG).groups if scrambled else ():
        mask = fixed_masks().get(group.name, torch.ones(group.size))
        for piece in group.slices:
            gone = (mask == 0).repeat_interleave(piece.block)
            made[piece.path].movedim(piece.dim, 0)[gone] *= -3.0
    return made


class Batches:
    """Rows of different lengths and with holes in their targets: no two have equally many targets."""

    def row(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 + number)
        prompt = CONFIG["prompt_length"]
        ids = torch.randint(0, CONFIG["vocab_size"], (LENGTH,), generator=generator)
        ids[:prompt] = torch.arange(prompt) + 2 * prompt
        is_text = torch.arange(LENGTH) >= prompt
        length = prompt + 2 + (3 * number * number + number) % (LENGTH - prompt - 1)
        targets = torch.where(is_text & (torch.arange(LENGTH) < length), ids.roll(-1), -100)
        return {
            "input": ids,
            "length": torch.tensor(length),
            "context": ~is_text,
            "position": torch.arange(LENGTH),
            "segment": is_text * 2,
            "span": torch.zeros(LENGTH, dtype=torch.long),
            "targets": targets,
        }

    def rows(self, numbers: range) -> dict[str, torch.Tensor]:
        rows = [self.row(number) for number in numbers]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def micro_batches(self, step: int, rank: int, world_size: int, size: int) -> list[dict[str, torch.Tensor]]:
        share = ROWS // world_size
        first = step * ROWS + rank * share
        return [self.rows(range(begin, begin + size)) for begin in range(first, first + share, size)]

    def num_targets(self, step: int) -> int:
        return int((self.rows(range(step * ROWS, (step + 1) * ROWS))["targets"] != -100).sum())

    def sample_ids(self, step: int, rank: int = 0, world_size: int = 1) -> list[str]:
        share = ROWS // world_size
        return [str(step * ROWS + rank * share + number) for number in range(share)]

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert not state


def make_gates() -> Gates:
    """Gates of all kinds at once: one constraint over the blocks, one a block over its heads or dims."""
    groups = [g for kind in ("layer", "heads", "dimff") for g in ADAPTER.space(CONFIG).of(kind)]
    sizes = [sum(g.size for g in groups if g.kind == "layer"), *(g.size for g in groups if g.kind != "layer")]
    constraints = [
        Constraint(name=str(i), start=sum(sizes[:i]), costs=(1 / size,) * size, target=0.4)
        for i, size in enumerate(sizes)
    ]
    # Targets within reach at every step: else all gates would move at full speed, whatever the loss says.
    return Gates(
        {g.name: g.size for g in groups},
        constraints,
        steps=STEPS,
        seed=5,
        learning_rate=0.5,
        relaxation=HardConcrete(initial_log_alpha=0.5),
    )


def attach(model: torch.nn.Module, names: set[str], fixed: dict[str, torch.Tensor]) -> AttachedGates:
    return AttachedGates(model, [g for g in ADAPTER.space(CONFIG).groups if g.name in names | set(fixed)], fixed)


def fixed_masks() -> dict[str, torch.Tensor]:
    """An FFN block gone, and units of the other blocks."""
    masks = {"layers.1.ffn": torch.zeros(1), "layers.0.att": torch.ones(1)}
    masks["layers.0.heads"] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    masks["layers.0.dimff"] = (torch.arange(20) % 3 > 0).float()
    return masks


def plain_run(
    training: TrainingConfig,
    *,
    gated: bool = True,
    masked: bool = False,
    skipped: tuple[int, ...] = (),
    extra: Any = None,
) -> dict[str, Any]:
    """The same training in plain PyTorch, the whole batch at once, without the updates of the steps `skipped`.

    `extra(model)` gives an object that is called with batch, targets and logits for a loss summed over the targets, and
    whose `step()` comes after each update.
    """
    model = build()
    model.load_state_dict(weights())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=training.weight_decay
    )
    gates = make_gates() if gated else None
    attached = attach(model, set(gates.sizes) if gates else set(), fixed_masks() if masked else {})
    more = extra(model) if extra else None
    losses, norms, updates = [], [], 0
    for step in range(1, STEPS + 1):
        batch = Batches().rows(range((step - 1) * ROWS, step * ROWS))
        targets = batch.pop("targets")
        z = gates.draw(step).requires_grad_() if gates else None
        if gates and z is not None:
            attached.set(gates.split(z))
        logits = model(**batch).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        (loss + more(batch, targets, logits) / (targets != -100).sum() if more else loss).backward()
        bound = training.clip or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), bound)))
        losses.append(loss.item())
        if step in skipped:
            continue
        updates += 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, updates)
        if training.train_weights:
            optimizer.step()
        if gates and z is not None:
            assert z.grad is not None
            gates.update(z.grad, updates)
        if more:
            more.step()
    final = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": final, "gates": gates.state_dict() if gates else None}


def engine_run(case: dict[str, Any], distil: Any = None) -> dict[str, Any]:
    """A case on an engine; `distil(engine, attached)` gives its extra loss.

    `zero`, `training` (changes of TRAINING), `deepspeed` (a config), `fresh`, `gated`, `masked`, `scrambled`, `save` (a
    folder for a checkpoint at the end), `limits` of steps, and faults to inject: `nan_loss`, `inf_gradient` and
    `huge_gradient` name a rank, at step 3 or the steps `at`; `wrong_shape` spoils what rank 0 reads.
    """
    training = dataclasses.replace(TRAINING, **case.get("training", {}))
    deepspeed = {**case.get("deepspeed", {})}
    deepspeed["zero_optimization"] = {"stage": case["zero"], **deepspeed.get("zero_optimization", {})}
    tensors = weights(scrambled=case.get("scrambled", False))
    if case.get("wrong_shape") and distributed.rank() == 0:
        tensors["encoder.output_layernorm.weight"] = torch.ones(1)
    try:
        engine = Engine(build, None if case.get("fresh") else tensors, training, deepspeed)
    except UserError as mistake:
        return {"error": str(mistake)}
    start = {name: tensor.clone() for name, tensor in engine.full_weights()}
    gates = make_gates() if case.get("gated", True) else None
    masks = fixed_masks() if case.get("masked") else {}
    attached = attach(engine.module, set(gates.sizes) if gates else set(), masks)
    distiller = distil(engine, attached) if distil else None
    projections = distiller.projections if distiller else None
    losses, norms, rates, problems, updates = [], [], [], {}, 0
    rank, world = distributed.rank(), distributed.world_size()
    for step in range(1, training.steps + 1):
        result = train_step(
            engine,
            Batches().micro_batches(step - 1, rank, world, training.micro_batch_size),
            step,
            num_targets=Batches().num_targets(step - 1),
            learning_rate=learning_rate(training, updates + 1),
            attached=attached,
            gates=gates,
            extra_loss=distiller or _fault(case, step, rank),
            projections=projections,
            asked=Request.NOTHING,
            update=updates + 1,
            limits=Limits(**case.get("limits", {}).get(str(step), {})),
        )
        updates += result.applied
        losses.append(result.loss)
        norms.append(engine.gradient_norm())
        rates.append(engine.learning_rate())
        if result.problem:
            problems[step] = result.problem
    final = {name: tensor.clone() for name, tensor in engine.full_weights()}
    if "save" in case:
        engine.save(Path(case["save"]))
    attached.remove()
    engine.close()
    return {
        "losses": losses,
        "norms": norms,
        "rates": rates,
        "start": start,
        "weights": final,
        "problems": problems,
        "gates": gates.state_dict() if gates else None,
        "projections": projections.state_dict()["weights"] if projections else None,
    }


class ExtraLoss:
    """A loss of the student's logits alone."""

    def __init__(self, loss: Any):
        self._loss = loss

    def prepare(self, batch: dict[str, torch.Tensor]) -> None:
        pass

    def __call__(self, _batch: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        return self._loss(logits)


def _fault(case: dict[str, Any], step: int, rank: int) -> Any:
    def gradient_times(factor: float) -> Any:
        def extra_loss(logits: torch.Tensor) -> torch.Tensor:
            # The sign: infinity times 0 is NaN, and that is another fault.
            logits.register_hook(lambda gradient: (gradient.sign() + 0.5 if math.isinf(factor) else gradient) * factor)
            return logits.new_zeros(())

        return ExtraLoss(extra_loss)

    if step not in case.get("at", [3]):
        return None
    if case.get("nan_loss") == rank:
        return ExtraLoss(lambda logits: logits.sum() * float("nan"))
    if case.get("inf_gradient") == rank:
        return gradient_times(math.inf)
    if case.get("huge_gradient") == rank:
        return gradient_times(1e6)
    return None


def main() -> None:
    initialise_processes(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {name: engine_run(case) for name, case in cases.items()}
    torch.save(results, f"{sys.argv[2]}.{distributed.rank()}")


if __name__ == "__main__":
    main()
