from __future__ import annotations

import numpy as np
import pytest
import torch

from cook.pruning.relaxation import Deterministic, HardConcrete

RELAXATIONS = [Deterministic(), HardConcrete()]


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_the_slope_is_the_derivative_of_openness(relaxation):
    values = torch.linspace(max(-3.0, relaxation.low), min(3.0, relaxation.high), 30, dtype=torch.float64)
    leaf = values.clone().requires_grad_()
    relaxation.openness(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, relaxation.slope(values))


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_the_ends_are_open_and_shut(relaxation):
    ends = torch.tensor([relaxation.low, relaxation.high])
    shut, open_ = relaxation.openness(ends).tolist()
    assert shut < 0.01 and open_ > 0.99
    assert float(relaxation.openness(relaxation.start(50, 0)).min()) > 0.98


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_a_higher_rank_starts_more_open_and_all_start_above_half(relaxation):
    openness = relaxation.openness(relaxation.ranked(torch.linspace(0, 1, 11)))
    assert torch.equal(openness, openness.sort().values) and openness[0] < openness[-1] and openness[0] > 0.5


def test_the_binarization_gradient_is_the_slope_of_the_concave_term_and_hard_concrete_gates_have_none():
    values = torch.rand(20, dtype=torch.float64)
    leaf = values.clone().requires_grad_()
    (3.0 * 0.25 * leaf * (1 - leaf)).sum().backward()
    torch.testing.assert_close(Deterministic(concavity=3.0).binarization_gradient(values, 0.25), leaf.grad)
    # At the end it is without bound in a row where gates are in between, and only there.
    between, decided = Deterministic(concavity=2.0).binarization_gradient(torch.tensor([[0.3, 0.7], [0.0, 1.0]]), 1.0)
    torch.testing.assert_close(between, torch.tensor([40.0, -40.0]))
    torch.testing.assert_close(decided, torch.tensor([2.0, -2.0]))
    assert (
        not Deterministic().binarization_gradient(values, 0.0).any()
        and not HardConcrete().binarization_gradient(values, 1.0).any()
    )


def test_rates_fall_with_the_length_of_the_stage_within_bounds():
    for relaxation in RELAXATIONS:
        rates = [relaxation.learning_rate(steps) for steps in (10, 50, 100, 300, 1000, 10_000)]
        assert rates == sorted(rates, reverse=True) and np.isfinite(rates).all()
