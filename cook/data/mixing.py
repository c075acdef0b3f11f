"""How often each source is read, following what the model has still to learn from it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def updated_weights(
    weights: Sequence[float], losses: Sequence[float], references: Sequence[float]
) -> tuple[float, ...]:
    """One update of dynamic batch loading, Algorithm 1 of Sheared LLaMA (Xia et al. 2023, arXiv 2310.06694).

    Δ_i = max(ℓ_i − ℓ_i_ref, 0), α_i = w_i · exp(Δ_i), w_i ← α_i / Σ_j α_j: a source whose loss is above its reference
    is read more often, one that has reached it falls back in proportion.

    Args:
        weights: (S,) shares of the sources until now.
        losses: (S,) held-out loss of each source, in nats a token.
        references: (S,) loss that each is expected to come down to.

    Returns:
        (S,) shares that sum to 1. A loss that is not finite leaves the shares as they are.
    """
    if not all(map(math.isfinite, losses)):
        return tuple(weights)
    excess = [max(loss - reference, 0.0) for loss, reference in zip(losses, references, strict=True)]
    # A common factor drops out of the ratio: without the largest excess nothing overflows.
    grown = [weight * math.exp(delta - max(excess)) for weight, delta in zip(weights, excess, strict=True)]
    return tuple(value / sum(grown) for value in grown)
