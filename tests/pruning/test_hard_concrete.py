from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cook.pruning.hard_concrete import BETA, EPSILON, GAMMA, ZETA, probability_open, sample, uniform_noise

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
