from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.pruning.controller import Constraint
from cook.pruning.gates import Gates, size_of_step
from cook.pruning.relaxation import Deterministic, HardConcrete, sample

RELAXATIONS = [Deterministic(), HardConcrete()]


def make(sizes=(5, 3), targets=(0.4, 1 / 3), steps=200, seed=4, **options) -> Gates:
    constraints = [
        Constraint(name=f"g{i}", start=sum(sizes[:i]), costs=(1 / size,) * size, target=target)
        for i, (size, target) in enumerate(zip(sizes, targets, strict=True))
    ]
    return Gates(
        {c.name: len(c.costs) for c in constraints},
        constraints,
        steps=steps,
        seed=seed,
        **{"relaxation": HardConcrete(), **options},
    )


def advance(gates: Gates, first: int, last: int) -> torch.Tensor:
    """Steps whose gradients depend on the drawn z, so that different noise shows."""
    for step in range(first, last + 1):
        z = gates.draw(step)
        weight = torch.linspace(-1, 1, len(z)) * (1 + step % 3)
        gates.update(weight * (z + 0.5), step)
    return gates.values


@pytest.mark.parametrize("at", [5, 25])
@pytest.mark.parametrize("start", ["open", "taylor", "fisher"])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_a_resumed_run_is_bit_identical(relaxation, start, at):
    whole, first, second = (make(relaxation=relaxation, start=start) for _ in range(3))
    advance(whole, 1, 60)
    advance(first, 1, at)
    state = {k: v.clone() for k, v in first.state_dict().items()}
    advance(first, at + 1, at + 5)  # must not reach into what was saved
    second.load_state_dict(state)
    advance(second, at + 1, 60)
    assert torch.equal(whole.values, second.values)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize(
    "at, left_out",
    [(25, name) for name in ("values", "moment", "second_moment", "steps", "start_sparsity", "gathered")]
    + [(5, "gathered")],
)
def test_leaving_a_part_of_the_state_out_shows(left_out, at):
    whole, second = make(start="taylor"), make(start="taylor")
    advance(whole, 1, at)
    fresh = make(relaxation=HardConcrete(initial_log_alpha=1.0), start="taylor").state_dict()
    second.load_state_dict(whole.state_dict() | {left_out: fresh[left_out]})
    assert not torch.equal(advance(whole, at + 1, 30), advance(second, at + 1, 30))


def test_the_state_of_other_gates_is_refused():
    with pytest.raises(AssertionError, match="other gates"):
        make().load_state_dict(make(sizes=(5, 4)).state_dict())


def test_a_draw_depends_on_seed_and_step_alone():
    first, again, other = make(), make(), make(seed=5)
    draws = [first.draw(step) for step in (1, 2, 1)]
    again.draw(7)
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], again.draw(2))
    assert not torch.equal(draws[0], draws[1])
    other.values = first.values.clone()
    first.values, other.values = torch.zeros(8), torch.zeros(8)
    assert not torch.equal(first.draw(1), other.draw(1))
    assert not first.draw(1).requires_grad


def test_noise_is_new_in_every_step():
    gates = make()
    gates.values = torch.zeros(8)
    draws = [gates.draw(step) for step in range(1, 30)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_update_carries_the_gradient_of_z_to_log_alpha(monkeypatch):
    gates = make()
    gates.values = torch.linspace(-2, 2, 8)
    z = gates.draw(3)
    seen = []
    monkeypatch.setattr(gates.controller, "step", lambda a, gradient, targets, **_: seen.append((gradient, targets)))
    weight = torch.arange(8.0) - 3
    gates.update(weight, 3)
    # The slope of z in logα by the inverse of the formula: s = (z + 0.1) / 1.2, dz/dα = 1.2 s (1 − s) / β.
    s = (z.double() + 0.1) / 1.2
    slope = torch.where((z > 0) & (z < 1), 1.2 * s * (1 - s) / (2 / 3), torch.zeros(8, dtype=torch.float64))
    assert slope.count_nonzero() > 2
    torch.testing.assert_close(seen[0][0].double(), weight * slope, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen[0][1], gates.targets(3))
    with pytest.raises(AssertionError, match="without draw"):
        gates.update(weight, 4)


def test_split_is_differentiable_and_in_order():
    gates = make()
    z = torch.arange(8.0, requires_grad=True)
    parts = gates.split(z)
    assert list(parts) == ["g0", "g1"] and parts["g1"].tolist() == [5, 6, 7]
    parts["g1"].sum().backward()
    assert z.grad is not None and z.grad.tolist() == [0] * 5 + [1] * 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=4), st.data())
def test_a_fine_constraint_ends_with_exactly_its_number(sizes, data):
    kept = [data.draw(st.integers(0, size)) for size in sizes]
    targets = tuple(1.0 - k * (1 / size) for k, size in zip(kept, sizes, strict=True))
    gates = make(tuple(sizes), targets, seed=data.draw(st.integers(0, 99)))
    ties = data.draw(st.booleans())
    gates.values = torch.zeros_like(gates.values) if ties else torch.randn_like(gates.values)
    masks = gates.binary()
    for (name, mask), number, values in zip(masks.items(), kept, gates.split(gates.values).values(), strict=True):
        assert int(mask.sum()) == number and set(mask.tolist()) <= {0.0, 1.0}, name
        if 0 < number < len(mask):  # those of largest logα stay
            assert values[mask == 1].min() >= values[mask == 0].max()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=60), st.floats(0, 0.99), st.integers(0, 99))
def test_a_coarse_constraint_ends_within_half_a_block(sizes, target, seed):
    total = sum(sizes)
    constraint = Constraint(name="blocks", start=0, costs=tuple(s / total for s in sizes), target=target)
    gates = Gates({f"b{i}": 1 for i in range(len(sizes))}, [constraint], steps=100, seed=seed)
    gates.values = torch.tensor(np.random.default_rng(seed).normal(0, 3, len(sizes)), dtype=torch.float32)
    removed = sum(size for size, mask in zip(sizes, gates.binary().values(), strict=True) if not mask.item())
    assert abs(removed / total - target) <= max(sizes) / total / 2 + 1e-9


def owned(sizes: list[int], dims: int, target: float, relaxation=None) -> Gates:
    """Query heads of several key-value heads, these, and other units, in one budget."""
    heads, keys = sum(sizes), len(sizes)
    costs = [2.0] * heads + [3.0] * keys + [1.0] * dims
    owners = [heads + n for n, size in enumerate(sizes) for _ in range(size)] + [-1] * (keys + dims)
    shares = tuple(cost / sum(costs) for cost in costs)
    budget = Constraint(name="all", start=0, costs=shares, target=target, owners=tuple(owners))
    names = {"heads": heads, "keys": keys, "dims": dims}
    return Gates(names, [budget], steps=200, seed=1, relaxation=relaxation or Deterministic())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.integers(1, 20),
    st.floats(0, 0.99),
    st.integers(0, 99),
    st.sampled_from(RELAXATIONS),
)
def test_key_value_heads_go_with_the_last_of_their_query_heads(sizes, dims, target, seed, relaxation):
    gates = owned(sizes, dims, target, relaxation)
    count, random = len(gates.values), torch.Generator().manual_seed(seed)
    gates.values = relaxation.low + (relaxation.high - relaxation.low) * torch.rand(count, generator=random)
    masks = gates.binary()
    read = torch.stack([part.amax() for part in masks["heads"].split(sizes)])
    assert torch.equal(masks["keys"], read)
    gone = {name: float((mask == 0).sum()) for name, mask in masks.items()}
    total = 2 * sum(sizes) + 3 * len(sizes) + dims
    removed = (2 * gone["heads"] + 3 * gone["keys"] + gone["dims"]) / total
    assert abs(removed - target) <= (2 + 3) / 2 / total * (1 + 1e-9)


def test_heads_whose_keys_close_go_first():
    gates = owned([2, 2], 2, 7 / 16)
    gates.values = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.3, 1.0, 0.65, 0.5])
    # 0.9 · 0.3 and 0.8 · 0.3 are below every other value: these two heads and their keys, and nothing else.
    assert {name: mask.tolist() for name, mask in gates.binary().items()} == {
        "heads": [0, 0, 1, 1],
        "keys": [0, 1],
        "dims": [1, 1],
    }


@pytest.mark.parametrize("worth", [0.0, 1.0])
def test_whole_groups_or_heads_inside_them_as_the_task_wants_it(worth):
    """Of three groups of two heads, one group is useless; or one head of every group."""
    gates = owned([2, 2, 2], 1, (2 * 2 + 3 if worth == 0 else 3 * 2) / 22)
    value = torch.tensor([1.0, 1, 1, 1, 0, 0] if worth == 0 else [1.0, 0, 1, 0, 1, 0])
    for step in range(1, 201):
        z = gates.draw(step).requires_grad_()
        parts = gates.split(z)
        left = parts["heads"] * parts["keys"].repeat_interleave(2)
        (((1 - left) ** 2 + (1 - left)) * value).sum().add((1 - parts["dims"]).sum()).backward()
        gates.update(z.grad, step)
    masks = gates.binary()
    assert masks["heads"].tolist() == value.tolist() and masks["dims"].tolist() == [1]
    assert masks["keys"].tolist() == ([1, 1, 0] if worth == 0 else [1, 1, 1])
    assert gates.split(gates.values)["keys"].tolist() == pytest.approx(masks["keys"].tolist(), abs=1e-3)


def test_a_score_is_gathered_over_a_resume():
    whole, second = make(start="fisher", start_steps=2), make(start="fisher", start_steps=2)
    strong, weak = torch.arange(8.0), torch.linspace(0.1, 0.0, 8)
    whole.draw(1)
    whole.update(strong, 1)
    second.load_state_dict(whole.state_dict())
    second.draw(2)
    second.update(weak, 2)
    assert torch.equal(torch.argsort(second.values[:5]), torch.arange(5))


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("start", ["taylor", "fisher"])
def test_a_scored_start_ranks_the_units_of_each_constraint(start, relaxation):
    gates, rng = make(relaxation=relaxation, start=start, start_steps=4), np.random.default_rng(1)
    gradients = rng.normal(0, 1, (4, 8))
    for step, gradient in enumerate(gradients, start=1):
        assert torch.equal(gates.draw(step), torch.ones(8))  # open while the score is gathered
        assert float(gates.expected_sparsity().max()) < 0.02
        gates.update(torch.tensor(gradient), step)
    score = np.abs(gradients.sum(0)) if start == "taylor" else (gradients**2).sum(0)
    for part in (slice(0, 5), slice(5, 8)):
        assert np.array_equal(np.argsort(gates.values[part].numpy()), np.argsort(score[part]))
    assert float(gates.expected_sparsity().max()) < 0.2
    torch.testing.assert_close(gates.targets(4), gates.expected_sparsity())
    advance(gates, 5, 200)
    wanted = torch.tensor([0.4, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(gates.expected_sparsity(), wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("curvature", [1.0, 10.0])
def test_deterministic_gates_draw_themselves_and_end_binary(curvature):
    gates = make(sizes=(50, 30), targets=(0.4, 1 / 3), relaxation=Deterministic(), steps=60)
    weight = torch.tensor(np.random.default_rng(0).normal(0, 1, 80)).float()
    for step in range(1, 61):
        z = gates.draw(step)
        assert torch.equal(z, gates.values) and not z.requires_grad
        assert float(z.min()) >= 0 and float(z.max()) <= 1
        # A convex loss: its relaxed optimum is fractional. The steeper, the longer it holds gates in between.
        gates.update(-weight.abs() * (1 + curvature * (0.7 - z)), step)
    for name, mask in gates.binary().items():
        assert (gates.split(gates.values)[name] - mask).abs().mean() < 0.002 * curvature, name


def test_without_concavity_deterministic_gates_stay_fractional():
    gates = make(sizes=(50,), targets=(0.4,), relaxation=Deterministic(concavity=0.0), steps=60)
    weight = torch.tensor(np.random.default_rng(0).normal(0, 1, 50)).float()
    for step in range(1, 61):
        gates.update(-weight.abs() * (1.5 - gates.draw(step)), step)
    assert float(((gates.values > 0.02) & (gates.values < 0.98)).float().mean()) > 0.3


def test_gates_start_open_and_apart():
    gates = make(sizes=(700,), targets=(0.5,), relaxation=HardConcrete(initial_log_alpha=3.0))
    assert len(set(gates.values.tolist())) > 690 and (gates.values - 3).abs().max() < 0.1
    assert float(gates.expected_sparsity()) < 0.02
    torch.testing.assert_close(gates.targets(0), gates.expected_sparsity())
    assert torch.equal(gates.targets(200), torch.tensor([0.5], dtype=torch.float64))
    assert torch.equal(sample(gates.values, torch.full((700,), 0.5)), torch.ones(700))


def nested(costs: np.ndarray, targets: list[float], *, seed=4, steps=60, relaxation=None, **options) -> Gates:
    """Gates of units with these costs, in one budget per size."""
    shares = tuple((costs / costs.sum()).tolist())
    budgets = [[Constraint(name=f"{t:g}", start=0, costs=shares, target=t)] for t in targets]
    relaxation = relaxation or Deterministic()
    own = dict(steps=steps, seed=seed, relaxation=relaxation, smaller=budgets[1:], **options)
    return Gates({"units": len(costs)}, budgets[0], **own)


def learn(gates: Gates, first: int, last: int) -> None:
    """Steps on a convex loss whose gradient depends on the drawn z."""
    worth = torch.tensor(np.random.default_rng(0).uniform(0, 1, len(gates.of_size(0)))).float()
    for step in range(first, last + 1):
        gates.update(-worth * (1.7 - gates.draw(step)), step)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.lists(st.floats(0, 0.99), min_size=2, max_size=4, unique=True),
    st.integers(0, 99),
    st.sampled_from(RELAXATIONS),
)
def test_masks_of_several_sizes_are_nested_and_each_meets_its_budget(costs, targets, seed, relaxation):
    costs, targets = np.array(costs, dtype=float), sorted(targets)
    gates = nested(costs, targets, relaxation=relaxation)
    # Any values, also such that the smaller sizes would keep other units than the larger ones.
    values = np.random.default_rng(seed).uniform(relaxation.low, relaxation.high, len(gates.values))
    gates.values = torch.tensor(values, dtype=torch.float32)
    masks = [gates.binary(number)["units"].numpy() for number in range(len(targets))]
    for mask, target in zip(masks, targets, strict=True):
        removed = costs[mask == 0].sum() / costs.sum()
        assert abs(removed - target) <= costs.max() / costs.sum() / 2 * (1 + 1e-9)
    assert all((small <= large).all() for large, small in itertools.pairwise(masks))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 99))
def test_key_value_heads_are_nested_with_their_query_heads(sizes, dims, seed):
    targets = [0.2, 0.45, 0.7]
    budgets = [owned(sizes, dims, target).constraints for target in targets]
    names = {"heads": sum(sizes), "keys": len(sizes), "dims": dims}
    gates = Gates(names, budgets[0], steps=200, seed=1, relaxation=Deterministic(), smaller=budgets[1:])
    gates.values = torch.rand(len(gates.values), generator=torch.Generator().manual_seed(seed))
    masks = [gates.binary(number) for number in range(3)]
    total = 2 * sum(sizes) + 3 * len(sizes) + dims
    for mask, target in zip(masks, targets, strict=True):
        assert torch.equal(mask["keys"], torch.stack([part.amax() for part in mask["heads"].split(sizes)]))
        gone = {name: float((z == 0).sum()) for name, z in mask.items()}
        assert abs((2 * gone["heads"] + 3 * gone["keys"] + gone["dims"]) / total - target) <= 2.5 / total * (1 + 1e-9)
    for large, small in itertools.pairwise(masks):
        assert all(bool((small[name] <= large[name]).all()) for name in names)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_every_step_ends_on_the_target_of_every_size(relaxation):
    costs, targets = np.random.default_rng(1).uniform(1, 3, 60), [0.2, 0.35, 0.5]
    gates = nested(costs, targets, relaxation=relaxation, steps=200)
    missed = []
    for step in range(1, 201):
        learn(gates, step, step)
        values = gates.values.view(3, -1)
        assert bool((values[1:] <= values[:-1]).all()), step
        openness = relaxation.openness(values.double()).numpy()
        sparsity = 1 - openness @ (costs / costs.sum())
        assert np.allclose(sparsity, gates.expected_sparsity().numpy(), rtol=0, atol=1e-12)
        missed.append(np.abs(sparsity - gates.targets(step).numpy()).max())
    # Values are float32: 60 roundings of 6e-8. At first hard concrete gates cannot close as fast as the targets rise.
    assert max(missed[20:]) < 1e-7
    assert [len(c.costs) for c in gates.constraints] == [60] * 3 and len(gates.multipliers) == 3
    assert len(gates.openness()) == 60


def test_deterministic_gates_of_every_size_end_binary():
    gates = nested(np.ones(50), [0.2, 0.5, 0.8], steps=90)
    learn(gates, 1, 90)
    for number in range(3):
        mask = gates.binary(number)["units"]
        assert int(mask.sum()) == (40, 25, 10)[number]
        assert float((gates.of_size(number) - mask).abs().mean()) < 0.01
    worth = np.random.default_rng(0).uniform(0, 1, 50)
    assert sorted(np.argsort(worth)[-10:]) == gates.binary(2)["units"].nonzero().flatten().tolist()


@pytest.mark.parametrize("start", ["open", "fisher"])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_a_resumed_run_of_several_sizes_is_bit_identical(relaxation, start):
    costs, targets = np.linspace(1, 2, 30), [0.3, 0.6]
    whole, first, second = (nested(costs, targets, relaxation=relaxation, start=start) for _ in range(3))
    learn(whole, 1, 40)
    learn(first, 1, 19)
    second.load_state_dict(first.state_dict())
    learn(second, 20, 40)
    assert torch.equal(whole.values, second.values)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_every_size_is_trained_once_in_as_many_steps_in_an_order_of_its_own():
    order = [size_of_step(step, 3, 7) for step in range(1, 61)]
    assert order == [size_of_step(step, 3, 7) for step in range(1, 61)]
    turns = [tuple(order[start : start + 3]) for start in range(0, 60, 3)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns) and len(set(turns)) > 3
    assert order != [size_of_step(step, 3, 8) for step in range(1, 61)]
    assert {size_of_step(step, 1, 7) for step in range(1, 9)} == {0}


def test_a_step_draws_the_gates_of_its_size():
    gates = nested(np.ones(4), [0.2, 0.6])
    gates.values = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    for step in range(1, 9):
        number = size_of_step(step, 2, gates.seed)
        assert torch.equal(gates.draw(step), gates.of_size(number))
        assert torch.equal(gates.largest(), gates.of_size(0))


def test_some_units_of_a_group_always_stay():
    """Six of ten must go, and the task would be rid of all five of the first group."""
    budget = Constraint(name="both", start=0, costs=(0.1,) * 10, target=0.6, least=((5, 2), (5, 0)))
    gates = Gates({"a": 5, "b": 5}, [budget], steps=40, seed=0)
    random = torch.Generator().manual_seed(0)
    for step in range(1, 41):
        gates.draw(step)
        gates.update(torch.tensor([1.0] * 5 + [-1.0] * 5) + 0.1 * torch.randn(10, generator=random), step)
        assert (gates.of_size(0)[:5] > 0.4).sum() >= 2
    masks = gates.binary()
    assert (masks["a"].sum(), masks["b"].sum()) == (2, 2)


def test_large_units_whose_fractions_are_free_do_not_take_a_budget_that_they_cannot_keep():
    """Five large units cost as much as a hundred small ones. Down to z = 0.6 they lose nothing, below it far more."""
    sizes, costs = {"large": 5, "small": 100}, torch.tensor([20.0] * 5 + [1.0] * 100)
    weights = torch.linspace(0.0, 0.01, 100)

    def loss(z):
        return 10 * ((0.6 - z[:5]).clamp(min=0) ** 2).sum() + (weights * (1 - z[5:])).sum()

    def learned(is_early):
        early = (True,) * 5 + (False,) * 100 if is_early else ()
        shares = tuple((costs / costs.sum()).tolist())
        budget = Constraint(name="all", start=0, costs=shares, target=0.5, early=early)
        gates = Gates(sizes, [budget], steps=60, seed=0, relaxation=Deterministic(early_concavity=6.0))
        for step in range(1, 61):
            z = gates.draw(step).requires_grad_()
            (gradient,) = torch.autograd.grad(loss(z), z)
            gates.update(gradient, step)
        masks = gates.binary()
        return masks["large"], float(loss(torch.cat([masks["large"], masks["small"]])))

    kept, early = learned(True)
    _, late = learned(False)
    assert kept.tolist() == [1] * 5 and early < 0.2 * late
