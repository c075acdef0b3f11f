"""Prices that depend on one another give the exact count, and their tangent; numbers that stay are multiples."""

from __future__ import annotations

import pytest
import torch

from cook.pruning.budgets import Targets, constraints, whole_cost
from cook.pruning.controller import GateController
from cook.pruning.count_pricing import in_multiples
from cook.pruning.counts import parameters
from cook.pruning.gates import Gates
from cook.pruning.mask_set import consistent, kept_counts
from cook.pruning.relaxation import Deterministic
from cook.pruning.units import WIDE
from tests.tiny_families import tiny_source

COSTS = {"parameters": {}, "flops": {"context": 7}, "bytes": {"context": 9, "number_bytes": 2}}
FAMILIES = ("llama", "llama, tied", "gpt2", "phi3", "bert")


def space_of(name):
    source = tiny_source(name)
    return source.adapter.space(source.config, source.adapter.head_units(source.config)[-1])


SPACES = {name: space_of(name) for name in (*FAMILIES, "cohere")}
STREAM = ("heads", "keys", "dimff", "hidden")
LEARNED = {"stream": STREAM, "heads": (*STREAM[:3], "head_dims"), "all": ("layer", *STREAM[:3], "head_dims", "hidden")}
LEARNED |= {"pinned": ("layer", "dimff", "head_dims")}


def learned_of(space, kinds=STREAM):
    return [group for kind in kinds for group in space.of(kind)]


def constraint_of(space, cost="parameters", kinds=STREAM, **named):
    targets = Targets(**{"scope": "global", "cost": cost, "share": 0.5} | COSTS[cost] | named)
    (made,) = constraints(space, learned_of(space, kinds), targets)
    return made, targets


def kept_after(space, constraint, closed, learned):
    """Units per group with these gates closed, and without the owners that have no open gates left."""
    z = torch.ones(len(constraint.costs))
    z[closed] = 0
    for owner in sorted({*constraint.owners} - {-1}, key=lambda gate: constraint.owners[gate] < 0):
        z[owner] = z[torch.tensor(constraint.owners) == owner].amax()
    parts = z.split([group.size for group in learned])
    return kept_counts(consistent(space, {group.name: part for group, part in zip(learned, parts, strict=True)}))


@pytest.mark.parametrize("kinds", LEARNED)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_count_after_each_gate_is_the_exact_one(name, cost, kinds):
    space, learned = SPACES[name], learned_of(SPACES[name], LEARNED[kinds])
    constraint, targets = constraint_of(space, cost, LEARNED[kinds])
    # Owners go with the last of their gates; a head or hidden dimension always stays.
    fixed, first = {*constraint.owners} - {-1}, 0
    for group in learned:
        fixed |= {first} if group.layer < 0 else set()
        first += group.size
    for seed in range(2):
        order = torch.randperm(len(constraint.costs), generator=torch.Generator().manual_seed(seed))
        order = torch.tensor([gate for gate in order.tolist() if gate not in fixed])
        removed = constraint.pricing.removed_after(order)
        whole = whole_cost(space, targets, {})
        for count in (*range(0, len(order), 7), len(order)):
            exact = whole_cost(space, targets, kept_after(space, constraint, order[:count], learned))
            # A sum of as many float64 numbers as there are gates.
            assert float(removed[count]) == pytest.approx(1 - exact / whole, abs=1e-10)


@pytest.mark.parametrize("kinds", LEARNED)
@pytest.mark.parametrize("name", FAMILIES)
def test_costs_are_the_tangent_of_the_share(name, kinds):
    space = SPACES[name]
    constraint, _ = constraint_of(space, kinds=LEARNED[kinds])
    pricing = constraint.pricing
    openness = torch.rand(len(constraint.costs), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    costs, offset = pricing.linearised(openness)
    sums = [part.sum() for part in openness.split(list(pricing.sizes))]
    assert float(costs @ openness) + offset == pytest.approx(pricing.share(torch.stack(sums)))
    for number, size in enumerate(pricing.sizes):
        ahead, behind = (torch.stack([s + (n == number) * step for n, s in enumerate(sums)]) for step in (1e-3, -1e-3))
        gate = sum(pricing.sizes[:number]) + size // 2
        assert float(costs[gate]) == pytest.approx((pricing.share(ahead) - pricing.share(behind)) / 2e-3)


def test_of_head_dims_and_hidden_dims_one_stays():
    space = SPACES["llama"]
    learned = learned_of(space, LEARNED["all"])
    constraint, _ = constraint_of(space, share=0.01, kinds=LEARNED["all"])
    gates = Gates({g.name: g.size for g in learned}, [constraint], steps=1, seed=0)
    gates.values = torch.rand(len(gates.values), generator=torch.Generator().manual_seed(1))
    for group in learned:
        gates.values[_place(learned, group.name)] -= 0.9 * (group.kind in WIDE)  # the first ones to go
    masks = gates.binary()
    assert {kind: int(masks[space.of(kind)[0].name].sum()) for kind in WIDE} == dict.fromkeys(WIDE, 1)


def _place(groups, name):
    start = sum(group.size for group in groups[: [group.name for group in groups].index(name)])
    return slice(start, start + next(group.size for group in groups if group.name == name))


def test_units_of_a_closed_block_have_no_price_and_move_by_the_task_alone():
    space = SPACES["llama"]
    learned = learned_of(space, LEARNED["all"])
    constraint, _ = constraint_of(space, kinds=LEARNED["all"])
    controller = GateController([constraint], Deterministic(), learning_rate=0.02)
    values = torch.ones(len(constraint.costs))
    values[0] = 0.0  # the gate of the first block
    inside = [g.name for g in learned if (g.layer, g.site) == (0, learned[0].site) and g.kind != "layer"]
    assert inside
    target = controller.expected_sparsity(values) + 1e-3
    gradient = torch.full_like(values, -1e-3)  # the task wants every gate open
    controller.step(values, gradient, target)
    assert values.isfinite().all() and values.min() >= 0
    # The price moves gates just as far as the target asks, and those that have none not at all.
    assert float(controller.expected_sparsity(values)) == pytest.approx(float(target), abs=1e-6)
    parts = dict(zip([g.name for g in learned], values.split([g.size for g in learned]), strict=True))
    assert all(bool((parts[name] == 1).all()) for name in inside)


@pytest.mark.parametrize("kinds", ["stream", "all"])
@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("name", SPACES)
def test_the_final_masks_meet_the_budget_to_within_a_unit(name, round_to, kinds):
    space = SPACES[name]
    learned = learned_of(space, LEARNED[kinds])
    constraint, _ = constraint_of(space, round_to=round_to, kinds=LEARNED[kinds])
    gates = Gates({g.name: g.size for g in learned}, [constraint], steps=1, seed=0)
    gates.values = torch.rand(len(gates.values), generator=torch.Generator().manual_seed(1))
    kept = kept_counts(consistent(space, gates.binary()))
    full = parameters(space)
    largest = max(
        parameters(space, kept | {g.name: min(g.size, kept[g.name] + round_to * (g.kind in ("dimff", "hidden")))})
        for g in learned
    )
    assert abs(parameters(space, kept) - full / 2) <= max(largest - parameters(space, kept), full // 20)
    for group in learned:
        if group.kind in ("dimff", "hidden"):
            assert kept[group.name] % round_to == 0 or kept[group.name] == group.size


def test_a_budget_of_a_model_of_real_size_is_met_to_a_thousandth():
    config = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 700, "head_dim": 32, "vocab_size": 4000}
    source = tiny_source("llama, tied", **config)
    space = source.adapter.space(source.config, "query_head")
    learned = learned_of(space, LEARNED["all"])
    whole = parameters(space)
    for share in (0.7, 0.4):
        [made] = constraints(space, learned, Targets(scope="global", cost="parameters", share=share))
        gates = Gates({g.name: g.size for g in learned}, [made], steps=1, seed=0)
        for seed in range(2):
            gates.values = torch.rand(len(gates.values), generator=torch.Generator().manual_seed(seed))
            found = parameters(space, kept_counts(consistent(space, gates.binary())))
            assert found == pytest.approx(share * whole, rel=1e-3)


def test_gates_go_in_multiples_at_the_mean_of_their_places():
    order = torch.tensor([0, 3, 5, 1, 2, 6, 4])
    new, allowed = in_multiples(order, (4, 3), (2, 1))
    # Of the first group, 0 and 3 go at 0.5, 1 and 2 at 3.5; of the second, 5 at 2, 6 at 5, 4 at 6.
    assert new.tolist() == [0, 3, 5, 1, 2, 6, 4] and allowed.tolist() == [0, 2, 3, 5, 6, 7]
    # Three of seven go first, so that four stay.
    new, allowed = in_multiples(torch.arange(7), (7,), (4,))
    assert new.tolist() == list(range(7)) and allowed.tolist() == [0, 3, 7]


def test_all_but_ffn_dims_decide_early_where_they_share_a_budget():
    space = SPACES["llama"] if "llama" in SPACES else next(iter(SPACES.values()))
    for cost in ("units", "parameters"):
        (made,) = constraints(
            space, learned_of(space, ("heads", "dimff")), Targets(scope="global", cost=cost, share=0.5)
        )
        heads = sum(group.size for group in space.of("heads"))
        assert made.early == (True,) * heads + (False,) * (len(made.costs) - heads)
    (alone,) = constraints(space, learned_of(space, ("dimff",)), Targets(scope="global", share=0.5))
    assert alone.early == ()
