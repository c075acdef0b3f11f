"""Hard concrete gates: a differentiable relaxation of 0/1 masks.

Source: Louizos, Welling and Kingma, "Learning sparse neural networks through L0 regularization" (ICLR 2018), eq. 10-12.
"""

from __future__ import annotations

import math

import torch

BETA = 2 / 3
GAMMA = -0.1
ZETA = 1.1
EPSILON = 1e-6
SHIFT = -BETA * math.log(-GAMMA / ZETA)
"""P(z ≠ 0) = σ(logα + SHIFT): the probability that the stretched variable is above 0."""


def uniform_noise(size: int, generator: torch.Generator) -> torch.Tensor:
    """u ~ U(ε, 1 − ε), float32 `[size]`."""
    return torch.rand(size, generator=generator) * (1 - 2 * EPSILON) + EPSILON


def sample(log_alpha: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Gates z ∈ [0, 1] for noise `u`, differentiable in `log_alpha`; same shape, float32 (eq. 10 and 11)."""
    s = torch.sigmoid((torch.logit(u) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def probability_open(log_alpha: torch.Tensor) -> torch.Tensor:
    """P(z ≠ 0) for each gate (eq. 12)."""
    return torch.sigmoid(log_alpha + SHIFT)
