"""The masks of `quality.py`: from gates, trained as a method says, and from scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from quality_peers import ShearedGates
from quality_rig import Rig

from cook.config.scheme import GatesStart
from cook.pruning import budgets
from cook.pruning.attach import by_feature
from cook.pruning.budgets import Targets
from cook.pruning.compensation import MeanInputs
from cook.pruning.controller import Constraint
from cook.pruning.counts import unit_parameters
from cook.pruning.gates import Gates
from cook.pruning.relaxation import Deterministic, HardConcrete
from cook.pruning.units import UnitGroup

Masks = dict[str, torch.Tensor]
MEAN_STEPS = 8
"""As `gates.start_steps`."""


def constraints(rig: Rig, groups: list[UnitGroup], share: float, scope: str) -> list[Constraint]:
    """As many units from every section of every block; of blocks, from all attention blocks and from all FFNs.

    With the scope `global` one budget instead, of as many parameters.
    """
    if scope == "global":
        each = [unit_parameters(rig.space, group) for group in groups]
        total = sum(size * group.size for size, group in zip(each, groups, strict=True))
        removed = sum(
            size * group.sections * round(share * group.section_size)
            for size, group in zip(each, groups, strict=True)
            if group.kind != "keys"  # the other rows keep them
        )
        targets = Targets(scope="global", cost="parameters", share=1 - removed / total)
        return budgets.constraints(rig.space, groups, targets)
    if groups[0].kind == "layer":
        sizes = [sum(group.site == site for group in groups) for site in ("att", "ffn")]
    else:
        sizes = [group.section_size for group in groups for _ in range(group.sections)]
    made, start = [], 0
    for number, size in enumerate(sizes):
        target = round(share * size) / size
        made.append(Constraint(name=str(number), start=start, costs=(1 / size,) * size, target=target))
        start += size
    return made


def in_order(groups: list[UnitGroup]) -> list[UnitGroup]:
    """The groups as `constraints` counts them."""
    return sorted(groups, key=lambda group: group.site) if groups[0].kind == "layer" else groups


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a method trains its gates."""

    relaxation: str = "auto"
    """As `gates.relaxation`; `sheared` for LLM-Shearing's."""
    start: GatesStart = "open"
    scope: str = "block"
    in_turn: bool = False
    """One kind of unit after the other, the steps shared between them."""
    text: float = 1.0
    """The weight of the language-model loss."""
    teacher: float = 0.0
    """The weight of the KL to the model with its gates open."""
    temperature: float = 1.0
    compensation: bool = False
    """What removed units add on average stays as a bias, as `gates.compensation`."""


TRAINED = {
    "sheared gates": Training(relaxation="sheared"),
    "hard concrete gates": Training(relaxation="hard_concrete"),
    "deterministic gates": Training(relaxation="deterministic"),
    "gates": Training(),
    "gates from Taylor": Training(start="taylor"),
    "gates from Fisher": Training(start="fisher"),
    "gates, global": Training(scope="global"),
    "taught gates, global": Training(scope="global", teacher=2.0, temperature=2.0),
    "compensated gates": Training(teacher=2.0, temperature=2.0, compensation=True),
    "compensated gates, global": Training(scope="global", teacher=2.0, temperature=2.0, compensation=True),
    "gates in turn": Training(in_turn=True),
    "taught gates": Training(teacher=2.0, temperature=2.0),
    "taught gates, T 1": Training(teacher=1.0),
    "taught gates, T 1, KL × 1/4": Training(teacher=0.25),
    "taught gates, T 1, KL × 4": Training(teacher=4.0),
    "taught gates, T 2, KL × 1": Training(teacher=1.0, temperature=2.0),
    "taught gates, T 2, KL × 4": Training(teacher=4.0, temperature=2.0),
    "taught gates, T 4": Training(teacher=1.0, temperature=4.0),
    "gates by KL alone": Training(text=0.0, teacher=1.0),
}


def trained_masks(
    rig: Rig, training: Training, unit: str, share: float, steps: int
) -> tuple[Masks, dict[str, Any], dict[str, torch.Tensor]]:
    """Masks from gates, what their training was like, and what is added to the inputs of output projections."""
    groups = in_order(rig.groups(unit, keys=training.scope == "global"))
    if not training.in_turn:
        means = mean_inputs(rig, groups) if training.compensation else {}
        rig.attached.compensate(means)
        masks, notes = one_training(rig, training, groups, share, steps, {})
        rig.attached.compensate({})
        gates = {group.name: group.gate for group in groups}
        return masks, notes, {n: mean * (1 - by_feature(gates[n], masks[n])) for n, mean in means.items()}
    kinds = list(dict.fromkeys(group.kind for group in groups))
    masks: Masks = {}
    for kind in kinds:
        part = [group for group in groups if group.kind == kind]
        masks |= one_training(rig, training, part, share, steps // len(kinds), masks)[0]
    return masks, {}, {}


@torch.no_grad()
def mean_inputs(rig: Rig, groups: list[UnitGroup]) -> dict[str, torch.Tensor]:
    """The mean input features of output projections on the first batches, all gates open."""
    means = MeanInputs(rig.model, [group for group in groups if group.kind != "keys"])
    rig.attached.set({})
    for step in range(MEAN_STEPS):
        ids = rig.batch(step, rig.options.seed)
        means.at(torch.arange(ids.numel()))
        rig.logits(ids)
    means.remove()
    return means.means()


def one_training(
    rig: Rig, training: Training, groups: list[UnitGroup], share: float, steps: int, fixed: Masks
) -> tuple[Masks, dict[str, Any]]:
    """Masks of these groups from gates, other units under the masks `fixed`."""
    sizes = {group.name: group.size for group in groups}
    made, seed = constraints(rig, groups, share, training.scope), rig.options.seed
    if training.relaxation == "sheared":
        gates: Gates = ShearedGates(sizes, made, steps=steps, seed=seed)
    else:
        noisy = groups[0].kind == "layer" if training.relaxation == "auto" else training.relaxation == "hard_concrete"
        relaxation = HardConcrete() if noisy else Deterministic()
        gates = Gates(sizes, made, steps=steps, seed=seed, relaxation=relaxation, start=training.start)
    for step in range(1, steps + 1):
        z, ids = gates.draw(step).requires_grad_(), rig.batch(step - 1, seed)
        teacher = rig.dense_logits(ids) if training.teacher else None
        rig.attached.set(fixed | gates.split(z))
        loss = (
            rig.loss(ids)
            if teacher is None
            else rig.taught_loss(
                ids, teacher, text=training.text, weight=training.teacher, temperature=training.temperature
            )
        )
        loss.backward()
        assert z.grad is not None
        gates.update(z.grad, step)
        rig.say(f"gates of {groups[0].kind}, {share:.0%}: {step} of {steps}, loss {float(loss.detach()):.3f}")
    notes: dict[str, Any] = {}
    if isinstance(gates.relaxation, Deterministic):
        first = next(iter(rig.texts))
        notes["relaxed"] = rig.measure(fixed | gates.split(gates.values), (first,))[first]
    return gates.binary(), notes


def scored_masks(
    rig: Rig, scores: dict[str, torch.Tensor], unit: str, share: float, scope: str
) -> dict[str, torch.Tensor]:
    """The same numbers as a constraint's, by score; from one budget by the score of a parameter."""
    groups = in_order(rig.groups(unit))
    budgets = constraints(rig, groups, share, scope)
    gates = Gates({group.name: group.size for group in groups}, budgets, steps=1, seed=0)
    gates.values = torch.cat([scores[group.name].float() for group in groups])
    if scope == "global":
        gates.values = gates.values.double() / torch.tensor(budgets[0].costs, dtype=torch.float64)
    return gates.binary()
