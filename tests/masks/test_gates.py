from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.masks.controller import Constraint
from cook.masks.gates import Gates
from cook.masks.hard_concrete import sample


def make(sizes=(5, 3), targets=(0.4, 1 / 3), steps=200, seed=4, **options) -> Gates:
    constraints = [
        Constraint(name=f"g{i}", start=sum(sizes[:i]), costs=(1 / size,) * size, target=target)
        for i, (size, target) in enumerate(zip(sizes, targets, strict=True))
    ]
    return Gates({c.name: len(c.costs) for c in constraints}, constraints, steps=steps, seed=seed, **options)


def advance(gates: Gates, first: int, last: int) -> torch.Tensor:
    """Steps whose gradients depend on the drawn z, so that different noise shows."""
    for step in range(first, last + 1):
        z = gates.draw(step)
        weight = torch.linspace(-1, 1, len(z)) * (1 + step % 3)
        gates.update(weight * (z + 0.5), step)
    return gates.log_alpha


def test_a_resumed_run_is_bit_identical():
    whole, first = make(), make()
    advance(whole, 1, 60)
    advance(first, 1, 25)
    state = {k: v.clone() for k, v in first.state_dict().items()}
    advance(first, 26, 30)  # must not reach into what was saved
    second = make()
    second.load_state_dict(state)
    advance(second, 26, 60)
    assert torch.equal(whole.log_alpha, second.log_alpha)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("left_out", ["log_alpha", "moment", "second_moment", "steps"])
def test_leaving_a_part_of_the_state_out_shows(left_out):
    whole, second = make(), make()
    advance(whole, 1, 25)
    state = whole.state_dict() | {left_out: make().state_dict()[left_out]}
    second.load_state_dict(state)
    assert not torch.equal(advance(whole, 26, 30), advance(second, 26, 30))


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
    other.log_alpha = first.log_alpha.clone()
    first.log_alpha, other.log_alpha = torch.zeros(8), torch.zeros(8)
    assert not torch.equal(first.draw(1), other.draw(1))
    assert not first.draw(1).requires_grad


def test_noise_is_new_in_every_step():
    gates = make()
    gates.log_alpha = torch.zeros(8)
    draws = [gates.draw(step) for step in range(1, 30)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_update_carries_the_gradient_of_z_to_log_alpha(monkeypatch):
    gates = make()
    gates.log_alpha = torch.linspace(-2, 2, 8)
    z = gates.draw(3)
    seen = []
    monkeypatch.setattr(gates.controller, "step", lambda a, gradient, targets: seen.append((gradient, targets)))
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
    gates.log_alpha = torch.zeros_like(gates.log_alpha) if ties else torch.randn_like(gates.log_alpha)
    masks = gates.binary()
    for (name, mask), number, values in zip(masks.items(), kept, gates.split(gates.log_alpha).values(), strict=True):
        assert int(mask.sum()) == number and set(mask.tolist()) <= {0.0, 1.0}, name
        if 0 < number < len(mask):  # those of largest logα stay
            assert values[mask == 1].min() >= values[mask == 0].max()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=60), st.floats(0, 0.99), st.integers(0, 99))
def test_a_coarse_constraint_ends_within_half_a_block(sizes, target, seed):
    total = sum(sizes)
    constraint = Constraint(name="blocks", start=0, costs=tuple(s / total for s in sizes), target=target)
    gates = Gates({f"b{i}": 1 for i in range(len(sizes))}, [constraint], steps=100, seed=seed)
    gates.log_alpha = torch.tensor(np.random.default_rng(seed).normal(0, 3, len(sizes)), dtype=torch.float32)
    removed = sum(size for size, mask in zip(sizes, gates.binary().values(), strict=True) if not mask.item())
    assert abs(removed / total - target) <= max(sizes) / total / 2 + 1e-9


def test_gates_start_open_and_apart():
    gates = make(sizes=(700,), targets=(0.5,), initial_log_alpha=3.0)
    assert len(set(gates.log_alpha.tolist())) > 690 and (gates.log_alpha - 3).abs().max() < 0.1
    assert float(gates.expected_sparsity()) < 0.02
    torch.testing.assert_close(gates.targets(0), gates.expected_sparsity())
    assert torch.equal(gates.targets(200), torch.tensor([0.5], dtype=torch.float64))
    assert torch.equal(sample(gates.log_alpha, torch.full((700,), 0.5)), torch.ones(700))
