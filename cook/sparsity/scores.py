"""What a weight is worth: gradients gathered over batches with the weights frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from cook.config.scheme import PatternScore
from cook.sparsity.matrices import PrunedMatrix

GradientPairs = Iterable[tuple[str, torch.Tensor]]


class ScoreAccumulator:
    """Sums scores over batches in float64.

    With M the mask and g = ∂L/∂(W∘M), a batch adds (∂L/∂M ∘ (W∘M))² = (g·W²·M)² (`taylor_w2`, the historical one) or
    the first-order Taylor term (g·W·M)² (`taylor`; Molchanov et al. 2019, eq. 8). `magnitude` is |W·M| and needs none.

    Args:
        matrices: What is scored.
        weights: Their values, frozen while batches are added.
        masks: M; None for a dense model.
        score: Which.
    """

    def __init__(
        self,
        matrices: Sequence[PrunedMatrix],
        weights: Mapping[str, torch.Tensor],
        *,
        masks: Mapping[str, torch.Tensor] | None = None,
        score: PatternScore = "taylor_w2",
    ):
        self.batches = 0
        self._score = score
        self._factors: dict[str, torch.Tensor] = {}
        for matrix in matrices:
            weight = weights[matrix.path].detach().double().cpu()
            kept = weight if masks is None else weight * masks[matrix.path].cpu()
            self._factors[matrix.path] = {"taylor_w2": kept.square(), "taylor": kept, "magnitude": kept.abs()}[score]
        gathers = score != "magnitude"
        self._sums = {path: torch.zeros_like(factor) for path, factor in self._factors.items() if gathers}

    def add(self, gradients: Mapping[str, torch.Tensor] | GradientPairs) -> None:
        """Adds one batch; one whose gradients are not finite, as fp16 overflows now and then, is left out.

        Args:
            gradients: Of every scored weight: of the whole batch, averaged over all ranks, not scaled, not clipped.
        """
        found = {path: gradient for path, gradient in dict(gradients).items() if path in self._sums}
        assert found.keys() == self._sums.keys(), "a batch without the gradient of a scored weight"
        if not all(bool(torch.isfinite(gradient).all()) for gradient in found.values()):
            return
        for path, gradient in found.items():
            self._sums[path] += (gradient.detach().double().cpu() * self._factors[path]).square()
        self.batches += 1

    def scores(self) -> dict[str, torch.Tensor]:
        """The sums so far, float64, each of its weight's shape."""
        assert self.batches or not self._sums, "no batch has been scored"
        return dict(self._sums or self._factors)
