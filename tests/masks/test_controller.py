from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cook.masks.controller import LOG_ALPHA_MAX, LOG_ALPHA_MIN, Constraint, GateController, ramp
from cook.masks.gates import Gates, automatic_learning_rate


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


@pytest.mark.parametrize(
    ("costs", "steps", "sizes", "targets"),
    [("uneven", *run) for run in RUNS] + [("even", *run) for run in RUNS if run[0] < 1000],
)
def test_expected_sparsity_follows_the_ramp_and_ends_on_target(costs, steps, sizes, targets):
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
    gates = Gates({c.name: len(c.costs) for c in constraints}, constraints, steps=steps, seed=steps)
    scale = 10 ** rng.uniform(-3, 3, sum(sizes))
    worst = -1.0
    for step in range(1, steps + 1):
        gates.draw(step)
        gates.controller.step(gates.log_alpha, random_gradient(rng, scale, step), gates.targets(step))
        worst = max(worst, float((gates.expected_sparsity() - gates.targets(step)).max()))
    final = gates.expected_sparsity()
    assert (final - torch.tensor(targets, dtype=torch.float64)).abs().max() < 0.01
    assert worst < 0.05
    assert gates.log_alpha.isfinite().all()
    assert LOG_ALPHA_MIN <= gates.log_alpha.min() and gates.log_alpha.max() <= LOG_ALPHA_MAX + 1e-6


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12])
def test_the_scale_of_the_loss_does_not_matter(scale):
    rng = np.random.default_rng(0)
    gradients = rng.normal(0, 1, (100, 24))
    ends = []
    for factor in (scale, 1.0):
        gates = Gates({"a": 24}, even((24,), (0.5,)), steps=100, seed=1)
        for step, gradient in enumerate(gradients * factor, start=1):
            gates.controller.step(gates.log_alpha, torch.tensor(gradient), gates.targets(step))
        assert abs(float(gates.expected_sparsity()) - 0.5) < 0.01
        ends.append(gates.log_alpha)
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


def test_a_step_is_the_projection_in_adams_metric():
    rng = np.random.default_rng(3)
    size, rate, target = 12, 0.3, 0.0
    controller = GateController(even((size,), (0.5,)), learning_rate=rate)
    gates = torch.tensor(rng.normal(2, 0.5, size))  # float64: nothing is rounded on the way
    want, moments = gates.numpy().copy(), (np.zeros(size), np.zeros(size))
    reached = 0
    for step in range(1, 40):
        target = min(0.5, 0.05 + 0.015 * step)
        gradient = rng.normal(0.2, 1, size) * np.linspace(0.1, 5, size)
        controller.step(gates, torch.tensor(gradient), torch.tensor([target], dtype=torch.float64))
        want, moments, multiplier = reference_step(
            want, moments, gradient, np.full(size, 1 / size), target, rate, step
        )
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
        gates = Gates({c.name: len(c.costs) for c in constraints}, constraints, steps=60, seed=0)
        gates.log_alpha = torch.linspace(2, 3, 20)[columns].clone()
        targets = torch.tensor([c.target for c in constraints], dtype=torch.float64)
        for gradient in gradients[:, columns]:
            gates.controller.step(gates.log_alpha, torch.tensor(gradient), targets)
        return gates.log_alpha

    both = run(even((8, 12), (0.25, 0.75)), slice(None))
    # Equal to rounding in the last place of float32: a sum over another number of gates may add in another order.
    assert torch.allclose(both[:8], run(even((8,), (0.25,)), slice(0, 8)), atol=1e-6)
    assert torch.allclose(both[8:], run(even((12,), (0.75,)), slice(8, 20)), atol=1e-6)


def test_a_gap_between_constraints_is_our_mistake():
    with pytest.raises(AssertionError, match="gaps"):
        GateController([Constraint(name="a", start=1, costs=(1.0,), target=0.5)], learning_rate=0.1)


def test_the_ramp():
    assert [ramp(s, 100, 0.2, 0.0, 0.5) for s in (0, 5, 10, 20, 100)] == [0.0, 0.125, 0.25, 0.5, 0.5]
    assert ramp(1, 100, 0.0, 0.0, 0.5) == 0.5 and ramp(20, 100, 0.2, 0.1, 0.05) == pytest.approx(0.05)


def test_the_automatic_rate_closes_an_open_gate_in_a_third_of_the_stage():
    for steps in (100, 1000, 5000):
        assert 0.05 <= automatic_learning_rate(steps) <= 1 and automatic_learning_rate(steps) * steps / 3 >= 9.9
