from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cook.pruning.relaxation import (
    BETA,
    EPSILON,
    GAMMA,
    ZETA,
    Deterministic,
    HardConcrete,
    of_gates,
    probability_open,
    sample,
    share_of_kind,
    uniform_noise,
)

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
    # Gates that decide early have it from the first step on.
    early = torch.tensor([1.0, 0.0])
    first = Deterministic(early_concavity=6.0).binarization_gradient(torch.tensor([0.75, 0.75]), 0.0, None, early)
    torch.testing.assert_close(first, torch.tensor([-3.0, 0.0]))
    # Each kind is judged by itself: a fractional block does not vanish among many decided dims.
    values = torch.cat([torch.tensor([0.3]), torch.ones(999)])[None]
    kinds = torch.tensor([[0] + [1] * 999])
    alike, apart = (Deterministic(concavity=2.0).binarization_gradient(values, 1.0, k) for k in (None, kinds))
    assert alike[0, 0] < 1 and apart[0].tolist() == pytest.approx([40.0] + [-2.0] * 999)
    assert (
        not Deterministic().binarization_gradient(values, 0.0).any()
        and not HardConcrete().binarization_gradient(values, 1.0).any()
    )


def test_rates_fall_with_the_length_of_the_stage_within_bounds():
    for relaxation in RELAXATIONS:
        rates = [relaxation.learning_rate(steps) for steps in (10, 50, 100, 300, 1000, 10_000)]
        assert rates == sorted(rates, reverse=True) and np.isfinite(rates).all()


LOG_ALPHA = np.linspace(-7, 7, 57)


def reference(log_alpha: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Louizos et al. 2018, eq. 10 and 11, in float64."""
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + log_alpha) / (2 / 3)))
    return np.minimum(1, np.maximum(0, s * (1.1 - -0.1) + -0.1))


def test_sample_is_the_formula():
    u = np.random.default_rng(0).uniform(EPSILON, 1 - EPSILON, (200, len(LOG_ALPHA))).astype(np.float32)
    got = sample(torch.tensor(LOG_ALPHA, dtype=torch.float32), torch.tensor(u))
    want = reference(LOG_ALPHA.astype(np.float32).astype(np.float64), u.astype(np.float64))
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - want).max() < 3e-6
    # Both ends are reached exactly, not merely approached.
    assert (got == 0).any() and (got == 1).any() and ((got == 0).numpy() == (want == 0)).mean() > 0.9999


def test_probability_is_the_formula():
    want = 1 / (1 + np.exp(-(LOG_ALPHA - 2 / 3 * np.log(0.1 / 1.1))))
    assert np.abs(probability_open(torch.tensor(LOG_ALPHA)).numpy() - want).max() < 1e-12
    assert (BETA, GAMMA, ZETA) == (2 / 3, -0.1, 1.1)


@pytest.mark.parametrize("log_alpha", [-5.0, -2.0, 0.0, 1.0, 3.0])
def test_probability_is_how_often_a_gate_is_open(log_alpha):
    draws = 400_000
    u = uniform_noise(draws, torch.Generator().manual_seed(int(log_alpha) + 9))
    share = float((sample(torch.full((draws,), log_alpha), u) != 0).double().mean())
    p = float(probability_open(torch.tensor(log_alpha, dtype=torch.float64)))
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / draws)


def test_the_gradient_is_that_of_the_formula_and_vanishes_at_the_clamp():
    rng = np.random.default_rng(1)
    log_alpha, u = rng.normal(0, 2, 500), rng.uniform(0.01, 0.99, 500)
    leaf = torch.tensor(log_alpha, requires_grad=True)
    z = sample(leaf, torch.tensor(u))
    z.sum().backward()
    step = 1e-6
    numeric = (reference(log_alpha + step, u) - reference(log_alpha - step, u)) / (2 * step)
    inside = (z.detach().numpy() > 1e-4) & (z.detach().numpy() < 1 - 1e-4)
    clamped = reference(log_alpha + step, u) == reference(log_alpha - step, u)
    assert inside.sum() > 100 and clamped.sum() > 50
    np.testing.assert_allclose(leaf.grad.numpy()[inside], numeric[inside], rtol=1e-6, atol=1e-8)
    assert (leaf.grad.numpy()[clamped] == 0).all()


def test_noise_stays_inside_and_is_the_generators():
    u = uniform_noise(1_000_000, torch.Generator().manual_seed(0))
    assert u.dtype == torch.float32 and u.min() >= EPSILON * 0.99 and u.max() < 1
    assert torch.logit(u).isfinite().all() and abs(float(u.mean()) - 0.5) < 0.002
    assert torch.equal(u, uniform_noise(1_000_000, torch.Generator().manual_seed(0)))


def test_the_share_of_a_kind_is_that_of_its_gates_in_its_row():
    rng = np.random.default_rng(0)
    part, whole, kinds = rng.random((3, 50)), rng.random((3, 50)), rng.integers(0, 4, (3, 50))
    numbers = torch.from_numpy(kinds)
    found = of_gates(share_of_kind(torch.from_numpy(part), torch.from_numpy(whole), numbers), numbers).numpy()
    alone = share_of_kind(torch.from_numpy(part), torch.from_numpy(whole), None)
    np.testing.assert_allclose(alone, part.sum(1, keepdims=True) / whole.sum(1, keepdims=True), rtol=1e-12)
    for row in range(3):
        for gate in range(50):
            same = kinds[row] == kinds[row, gate]
            assert found[row, gate] == pytest.approx(part[row, same].sum() / whole[row, same].sum(), rel=1e-12)
