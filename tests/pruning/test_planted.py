"""Planted useless units: what adds nothing to the model's output is exactly what the learned masks remove."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cook.models.cpm_ant import CpmAntForCausalLM
from cook.pruning.attach import AttachedGates
from cook.pruning.controller import Constraint
from cook.pruning.counts import unit_parameters
from cook.pruning.gates import Gates
from cook.pruning.relaxation import Deterministic, HardConcrete, Relaxation
from cook.pruning.units import PruningSpace, UnitGroup
from tests.models.cpm_ant_tiny import tiny_model
from tests.tiny_pruning import tiny_space

SIZES = dict(num_layers=3, num_heads=6, dim_head=4, dim_ff=16)
SPACE = tiny_space(**SIZES)
USELESS = {"heads": 2, "dimff": 6, "layer": 2}
STEPS = {"fine": 240, "blocks": 100}  # the weakest dims that are of use need a while to show it


def frozen_model(seed: int) -> CpmAntForCausalLM:
    return tiny_model(seed, **SIZES).requires_grad_(False)


def plant(model: CpmAntForCausalLM, groups: list[UnitGroup], seed: int) -> dict[str, list[int]]:
    """Zeroes the output weights of units drawn at random; returns which, by group."""
    random = torch.Generator().manual_seed(seed)
    planted = {}
    for group in groups:
        out = model.get_submodule(group.gate.module).weight
        width = out.shape[1] // group.size
        units = sorted(torch.randperm(group.size, generator=random)[: USELESS.get(group.kind, 0)].tolist())
        planted[group.name] = units
        for unit in units:
            out[:, unit * width : (unit + 1) * width] = 0
    return planted


def learn(model: CpmAntForCausalLM, gates: Gates, groups: list[UnitGroup], seed: int, *, deaf: bool = False):
    """Trains the gates alone, on the divergence from the model's own open outputs."""
    random = torch.Generator().manual_seed(1000 + seed)
    batches = [torch.randint(0, 61, (6, 12), generator=random) for _ in range(16)]
    targets = [F.log_softmax(model(input_ids=ids).logits, -1) for ids in batches]
    attached = AttachedGates(model, groups, {})
    for step in range(1, gates.steps + 1):
        ids, wanted = batches[step % 16], targets[step % 16]
        z = gates.draw(step).requires_grad_()
        attached.set(gates.split(z))
        logits = F.log_softmax(model(input_ids=ids).logits, -1)
        loss = F.kl_div(logits, wanted, reduction="sum", log_target=True) / ids.numel()
        loss.backward()
        gates.update(torch.zeros_like(z.grad) if deaf else z.grad, step)
    attached.remove()
    return {name: (mask == 0).nonzero().flatten().tolist() for name, mask in gates.binary().items()}


def fine_gates(space: PruningSpace, seed: int, relaxation: Relaxation) -> tuple[Gates, list[UnitGroup]]:
    groups = [g for g in space.groups if g.kind != "layer"]
    constraints, start = [], 0
    for group in groups:
        share = 1 / group.size
        target = USELESS[group.kind] * share
        constraints.append(Constraint(name=group.name, start=start, costs=(share,) * group.size, target=target))
        start += group.size
    sizes = {g.name: g.size for g in groups}
    return Gates(sizes, constraints, steps=STEPS["fine"], seed=seed, relaxation=relaxation), groups


def block_gates(space: PruningSpace, target: float, seed: int, relaxation: Relaxation) -> Gates:
    groups = space.of("layer")
    parameters = [unit_parameters(space, group) for group in groups]
    costs = tuple(p / sum(parameters) for p in parameters)
    constraint = Constraint(name="blocks", start=0, costs=costs, target=target)
    return Gates({g.name: 1 for g in groups}, [constraint], steps=STEPS["blocks"], seed=seed, relaxation=relaxation)


@pytest.mark.parametrize("relaxation", [Deterministic(), HardConcrete()])
@pytest.mark.parametrize("seed", range(6))
def test_useless_heads_and_dims_are_removed(seed, relaxation):
    model = frozen_model(seed)
    gates, groups = fine_gates(SPACE, seed, relaxation)
    planted = plant(model, groups, seed)
    assert learn(model, gates, groups, seed) == planted


@pytest.mark.parametrize("relaxation", [Deterministic(), HardConcrete()])
@pytest.mark.parametrize("seed", range(6))
def test_useless_blocks_are_removed(seed, relaxation):
    model, groups = frozen_model(seed), list(SPACE.of("layer"))
    drawn = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))[: USELESS["layer"]]
    useless = [groups[i] for i in sorted(drawn.tolist())]
    for group in useless:
        model.get_submodule(group.gate.module).weight.zero_()
    total = sum(unit_parameters(SPACE, group) for group in groups)
    target = sum(unit_parameters(SPACE, group) for group in useless) / total
    removed = learn(model, block_gates(SPACE, target, seed, relaxation), groups, seed)
    assert [name for name, units in removed.items() if units] == [group.name for group in useless]


@pytest.mark.parametrize("relaxation", [Deterministic(), HardConcrete()])
@pytest.mark.parametrize("seed", range(3))
def test_a_budget_for_all_blocks_finds_useless_units_wherever_they_are(seed, relaxation):
    model = frozen_model(seed)
    groups = sorted((g for g in SPACE.groups if g.kind != "layer"), key=lambda g: g.kind, reverse=True)
    # The whole first FFN, half of the second, and heads of the last block alone: no two blocks are alike.
    planted = {g.name: [] for g in groups} | {"layers.0.dimff": list(range(16)), "layers.1.dimff": list(range(8))}
    planted["layers.2.heads"] = [1, 2, 4]
    for group in groups:
        out = model.get_submodule(group.gate.module).weight
        width = out.shape[1] // group.size
        for unit in planted[group.name]:
            out[:, unit * width : (unit + 1) * width] = 0
    costs = [float(unit_parameters(SPACE, group)) for group in groups for _ in range(group.size)]
    useless = sum(unit_parameters(SPACE, group) * len(planted[group.name]) for group in groups)
    shares, target = tuple(cost / sum(costs) for cost in costs), useless / sum(costs)
    constraint = Constraint(name="heads and dims", start=0, costs=shares, target=target)
    gates = Gates({g.name: g.size for g in groups}, [constraint], steps=STEPS["fine"], seed=seed, relaxation=relaxation)
    assert learn(model, gates, groups, seed) == planted


@pytest.mark.parametrize("relaxation", [Deterministic(), HardConcrete()])
def test_without_the_task_loss_chance_decides(relaxation):
    right = 0
    for seed in range(2):
        model = frozen_model(seed)
        gates, groups = fine_gates(SPACE, seed, relaxation)
        planted = plant(model, groups, seed)
        right += learn(model, gates, groups, seed, deaf=True) == planted
    assert right == 0
