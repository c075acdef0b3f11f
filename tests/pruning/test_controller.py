from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from cook.pruning.controller import Constraint, GateController, ramp
from cook.pruning.gates import Gates
from cook.pruning.relaxation import Deterministic, HardConcrete

RELAXATIONS = [Deterministic(), HardConcrete()]


def even(sizes, targets):
    constraints, start = [], 0
    for number, (size, target) in enumerate(zip(sizes, targets, strict=True)):
        constraints.append(Constraint(name=str(number), start=start, costs=(1 / size,) * size, target=target))
        start += size
    return constraints


def random_gradient(rng, scale_of_gate, step):
    """Noise and signal, as task gradients are: each gate on its own scale, all of them drifting over decades."""
    drift = 10 ** (3 * math.sin(step / 37))
    return torch.tensor((rng.normal(0, 1, len(scale_of_gate)) - 0.3) * scale_of_gate * drift, dtype=torch.float32)


# steps, sizes of the constraints, their targets; with equal costs, as heads have, and unequal ones, as blocks have
RUNS = [
    (50, (16, 700), (0.75, 0.5)),
    (100, (16,), (0.1,)),
    (100, (16,), (0.3,)),
    (100, (16,), (0.9,)),
    (100, (700,), (0.5,)),
    (100, (700,), (0.9,)),
    (150, (16, 16, 16, 700, 700), (0.75, 0.1, 0.9, 0.5, 0.3)),
    (300, (16, 700), (0.67, 0.1)),
    (1000, (16,), (0.67,)),
    (1000, (8, 16, 3), (0.25, 0.9, 0.34)),
    (5000, (12,), (0.3,)),
]


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize(
    ("costs", "steps", "sizes", "targets"),
    [("uneven", *run) for run in RUNS] + [("even", *run) for run in RUNS if run[0] < 1000],
)
def test_expected_sparsity_follows_the_ramp_and_ends_on_target(costs, steps, sizes, targets, relaxation):
    rng = np.random.default_rng(steps + sum(sizes))
    constraints = even(sizes, targets)
    if costs == "uneven":
        constraints = []
        for number, (size, target) in enumerate(zip(sizes, targets, strict=True)):
            share = rng.uniform(1, 3, size)
            start = sum(sizes[:number])
            constraints.append(
                Constraint(name=str(number), start=start, costs=tuple(share / share.sum()), target=target)
            )
    named = {c.name: len(c.costs) for c in constraints}
    gates = Gates(named, constraints, steps=steps, seed=steps, relaxation=relaxation)
    scale = 10 ** rng.uniform(-3, 3, sum(sizes))
    worst = -1.0
    for step in range(1, steps + 1):
        gates.draw(step)
        gates.controller.step(gates.values, random_gradient(rng, scale, step), gates.targets(step))
        worst = max(worst, float((gates.expected_sparsity() - gates.targets(step)).max()))
    final = gates.expected_sparsity()
    assert (final - torch.tensor(targets, dtype=torch.float64)).abs().max() < 0.01
    assert worst < 0.05
    assert gates.values.isfinite().all()
    assert relaxation.low <= gates.values.min() and gates.values.max() <= relaxation.high + 1e-6


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12])
def test_the_scale_of_the_loss_does_not_matter(scale, relaxation):
    rng = np.random.default_rng(0)
    gradients = rng.normal(0, 1, (100, 24))
    ends = []
    for factor in (scale, 1.0):
        gates = Gates({"a": 24}, even((24,), (0.5,)), steps=100, seed=1, relaxation=relaxation)
        for step, gradient in enumerate(gradients * factor, start=1):
            gates.controller.step(gates.values, torch.tensor(gradient), gates.targets(step))
        assert abs(float(gates.expected_sparsity()) - 0.5) < 0.01
        ends.append(gates.values)
    if scale > 1e-20:
        assert (ends[0] - ends[1]).abs().max() < 1e-3


def reference_step(log_alpha, moments, gradient, cost, target, rate, steps):
    """One step for one constraint in float64 numpy; the multiplier by a fine scan and plain bisection."""
    b1, b2 = 0.9, 0.99
    m = b1 * moments[0] + (1 - b1) * gradient
    v = b2 * moments[1] + (1 - b2) * gradient**2
    scale = np.sqrt(v / (1 - b2**steps))
    scale = scale + 0.01 * scale.mean() + 1e-30
    task = m / (1 - b1**steps) / scale

    def p(x):
        return 1 / (1 + np.exp(-(x - 2 / 3 * np.log(0.1 / 1.1))))

    press = cost * p(log_alpha) * (1 - p(log_alpha)) / scale

    def moved(multiplier):
        return np.clip(log_alpha - rate * np.clip(task + multiplier * press, -1, 1), -7.0, 4.6)

    bound = 2 * ((1 + np.abs(task)) / press).max()
    low, high = -bound, bound
    for _ in range(200):
        middle = (low + high) / 2
        if 1 - (cost * p(moved(middle))).sum() < target:
            low = middle
        else:
            high = middle
    return moved(high), (m, v), high


def test_a_deterministic_step_is_the_projection_onto_the_box_and_the_budget():
    """Against scipy's quadratic programme: min ‖√v (x − x₀ + η·task)‖² with Σ cost·x fixed, 0 ≤ x ≤ 1."""
    rng, size, rate, target = np.random.default_rng(5), 9, 0.05, 0.4
    cost = rng.uniform(1, 3, size)
    cost /= cost.sum()
    controller = GateController(
        [Constraint(name="a", start=0, costs=tuple(cost), target=target)], Deterministic(), learning_rate=rate
    )
    gates = torch.tensor(rng.uniform(0.3, 0.9, size))
    start, gradient = gates.numpy().copy(), rng.normal(0, 1, size)
    wanted = 1 - (cost * start).sum() + 0.01
    controller.step(gates, torch.tensor(gradient), torch.tensor([wanted], dtype=torch.float64), hold=0.4)
    scale = np.abs(gradient) + 0.01 * np.abs(gradient).mean()
    aim = start - rate * (gradient / scale + 2.0 * 0.4 * (1 - 2 * start))
    found = minimize(
        lambda x: (scale * (x - aim) ** 2).sum(),
        start,
        jac=lambda x: 2 * scale * (x - aim),
        method="SLSQP",
        bounds=[(max(0, s - rate), min(1, s + rate)) for s in start],
        options={"ftol": 1e-14, "maxiter": 500},
        constraints={"type": "eq", "fun": lambda x: 1 - (cost * x).sum() - wanted, "jac": lambda x: -cost},
    )
    assert found.success
    np.testing.assert_allclose(gates.numpy(), found.x, atol=1e-5)


def test_a_step_is_the_projection_in_adams_metric():
    rng = np.random.default_rng(3)
    size, rate, target = 12, 0.3, 0.0
    controller = GateController(even((size,), (0.5,)), HardConcrete(), learning_rate=rate)
    gates = torch.tensor(rng.normal(2, 0.5, size))  # float64: nothing is rounded on the way
    want, moments = gates.numpy().copy(), (np.zeros(size), np.zeros(size))
    reached = 0
    for step in range(1, 40):
        target = min(0.5, 0.05 + 0.015 * step)
        gradient = rng.normal(0.2, 1, size) * np.linspace(0.1, 5, size)
        controller.step(gates, torch.tensor(gradient), torch.tensor([target], dtype=torch.float64))
        want, moments, multiplier = reference_step(want, moments, gradient, np.full(size, 1 / size), target, rate, step)
        np.testing.assert_allclose(gates.numpy(), want, rtol=0, atol=1e-7)
        want = gates.numpy().copy()  # each step is compared alone, without the last one's rounding
        if abs(float(controller.expected_sparsity(gates)) - target) < 1e-9:  # out of reach, any large λ will do
            assert abs(float(controller.multipliers) - multiplier) < 1e-5 * abs(multiplier) + 1e-9
            reached += 1
    assert reached > 20
    assert abs(float(controller.expected_sparsity(gates)) - target) < 1e-9


def test_constraints_do_not_touch_each_other():
    rng = np.random.default_rng(0)
    gradients = rng.normal(0, 1, (60, 20))

    def run(constraints, columns):
        named = {c.name: len(c.costs) for c in constraints}
        gates = Gates(named, constraints, steps=60, seed=0, relaxation=HardConcrete())
        gates.values = torch.linspace(2, 3, 20)[columns].clone()
        targets = torch.tensor([c.target for c in constraints], dtype=torch.float64)
        for gradient in gradients[:, columns]:
            gates.controller.step(gates.values, torch.tensor(gradient), targets)
        return gates.values

    both = run(even((8, 12), (0.25, 0.75)), slice(None))
    # Equal to rounding in the last place of float32: a sum over another number of gates may add in another order.
    assert torch.allclose(both[:8], run(even((8,), (0.25,)), slice(0, 8)), atol=1e-6)
    assert torch.allclose(both[8:], run(even((12,), (0.75,)), slice(8, 20)), atol=1e-6)


def test_a_gap_between_constraints_is_our_mistake():
    with pytest.raises(AssertionError, match="gaps"):
        GateController([Constraint(name="a", start=1, costs=(1.0,), target=0.5)], Deterministic(), learning_rate=0.1)


def test_the_ramp():
    assert [ramp(p, 0.2, 0.0, 0.5) for p in (0, 0.05, 0.1, 0.2, 1)] == [0.0, 0.125, 0.25, 0.5, 0.5]
    assert ramp(0.01, 0.0, 0.0, 0.5) == 0.5 and ramp(0.2, 0.2, 0.1, 0.05) == pytest.approx(0.05)


def test_the_automatic_rate_closes_an_open_gate_in_a_third_of_the_stage():
    for steps in (100, 1000, 5000):
        rate = HardConcrete().learning_rate(steps)
        assert 0.05 <= rate <= 1 and rate * steps / 3 >= 9.9
        rate = Deterministic().learning_rate(steps)
        assert 0.02 <= rate <= 0.1 and rate * steps / 3 >= 1


def test_small_gates_move_as_without_large_ones_of_another_kind_in_their_budget():
    """Up to the multiplier's tolerance. The large gates cost nothing, stay open, and have gradients of 1000."""
    rng, steps = np.random.default_rng(0), 12
    small = [torch.tensor(rng.normal(0, 1e-3, 8) * 10 ** rng.uniform(-2, 0, 8)) for _ in range(steps)]

    def moved(large):
        costs, kinds = (0.0,) * large + (1 / 8,) * 8, (0,) * large + (1,) * 8
        budget = Constraint(name="all", start=0, costs=costs, target=0.5, kinds=kinds)
        controller, values = GateController([budget], Deterministic(), learning_rate=0.05), torch.ones(large + 8)
        for step, gradient in enumerate(small, start=1):
            target = torch.tensor([0.5 * step / steps], dtype=torch.float64)
            controller.step(values, torch.cat([torch.full((large,), -1e3), gradient]), target)
        return values[large:]

    torch.testing.assert_close(moved(4), moved(0), rtol=0, atol=1e-6)
