"""Learned linear maps from the student's hidden size to the teacher's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from cook.base.seeds import generator

LEARNING_RATE = 1e-3  # Adam's default; the maps start at random and have no schedule


class Projections:
    """The linear maps of all pairs whose hidden sizes differ, the same on every rank.

    Like the gates they are not part of the engine: replicated, in fp32, with their own optimizer, without the engine's
    clipping and half precision. They are created when the sizes are first known. The student is mapped and not the
    teacher, because a map of the teacher could reduce the error by mapping everything to zero.

    Args:
        seed: The seed of the initial weights, combined with a pair's name.
        device: The device of the states.
    """

    def __init__(self, *, seed: int, device: torch.device | str = "cpu"):
        self._seed, self._device = seed, torch.device(device)
        self.weights: dict[str, torch.Tensor] = {}  # by the pair's name, `[teacher's width, student's width]`, fp32
        self._optimizer: torch.optim.Adam | None = None

    def apply(self, name: str, states: torch.Tensor, width: int) -> torch.Tensor:
        """Maps fp32 states `(..., student's width)` to `(..., width)`; creates the map if `name` has none."""
        if name not in self.weights:
            assert self._optimizer is None, "a map that appears after the first update"
            own = states.shape[-1]
            self._set(name, torch.randn(width, own, generator=generator(self._seed, "projection", name)) / own**0.5)
        return F.linear(states, self.weights[name])

    def gradient(self) -> torch.Tensor | None:
        """Returns the accumulated ∂L/∂weights of all maps as one fp32 vector, and clears it."""
        if not self.weights:
            return None
        parts = []
        for weight in self.weights.values():
            parts.append((torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten())
            weight.grad = None
        return torch.cat(parts)

    def update(self, gradient: torch.Tensor) -> None:
        """Updates the maps by `gradient`, in the form of `self.gradient`, averaged over ranks and micro-batches."""
        optimizer = self._optimizer = self._optimizer or self._made_optimizer()
        parts = gradient.split([weight.numel() for weight in self.weights.values()])
        for weight, part in zip(self.weights.values(), parts, strict=True):
            weight.grad = part.view_as(weight)
        optimizer.step()
        optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        weights = {name: weight.detach().cpu().clone() for name, weight in self.weights.items()}
        return {"weights": weights, "optimizer": self._optimizer.state_dict() if self._optimizer else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self._optimizer = {}, None
        for name, weight in state["weights"].items():
            self._set(name, weight)
        if state["optimizer"] is not None:
            self._optimizer = self._made_optimizer()
            self._optimizer.load_state_dict(state["optimizer"])

    def _set(self, name: str, weight: torch.Tensor) -> None:
        self.weights[name] = weight.to(self._device, torch.float32).clone().requires_grad_()

    def _made_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(list(self.weights.values()), lr=LEARNING_RATE)
