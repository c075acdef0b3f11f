"""Hooks into DeepSpeed's ZeRO optimizers: the gradient's norm before an update, and the optimizer states.

DeepSpeed reports the norm of a step's gradients only after the step, and its handling of a norm that is not finite
depends on the precision and the ZeRO stage. But all its ZeRO optimizers skip a step whose norm is not finite, on all
ranks, and clean up after it. So the hook reads the norm before the update, and returns infinity in place of a norm
that is not accepted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class NormWatch:
    """Reads the global gradient norm before the update, and can prevent the update.

    Args:
        optimizer: DeepSpeed's optimizer; a plain one at stage 0, where the engine calls `accepts` itself.
        zero_stage: Its ZeRO stage.
    """

    def __init__(self, optimizer: Any, zero_stage: int):
        self.norm: float | None = None
        """The norm of the last step, unscaled, before clipping; infinite if it was not finite."""
        self._limit, self._scale = math.inf, 1.0
        if zero_stage in (1, 2):
            norm_of = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda *args, **options: self._filtered([norm_of(*args, **options)])[0]
        elif zero_stage == 3:
            norms_of = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: self._filtered(norms_of())
        if hasattr(getattr(optimizer, "loss_scaler", None), "raise_error_at_min_scale"):
            optimizer.loss_scaler.raise_error_at_min_scale = False  # the loop counts and reports the steps that failed

    def begin(self, limit: float, scale: float) -> None:
        """Called before an update, with the largest allowed norm and the factor on the gradients."""
        self._limit, self._scale = limit, scale
        self.norm = math.inf  # DeepSpeed computes no norm if it finds an overflow first

    def accepts(self, norm: float) -> bool:
        """Stores a norm, and returns whether the update may be applied."""
        self.norm = norm / self._scale if math.isfinite(norm) and norm >= 0 else math.inf
        return math.isfinite(self.norm) and self.norm <= self._limit

    def _filtered(self, norms: Sequence[Any]) -> list[Any]:
        tensors = [torch.as_tensor(norm, dtype=torch.float32) for norm in norms]
        # A group whose gradient is not finite has the norm -1.
        sound = all(bool(norm >= 0) for norm in tensors)
        whole = float(torch.stack([norm.cpu() for norm in tensors]).norm()) if sound else math.inf
        return list(norms) if self.accepts(whole) else [torch.full_like(norm, math.inf) for norm in tensors]


def reserve_state(
    optimizer: Any, zero_stage: int, parameters: Sequence[Any], counters: Mapping[str, Any], keys: Sequence[str]
) -> None:
    """Creates the states that an optimizer has after its first step: `counters` unchanged, zeros for `keys`.

    Args:
        optimizer: DeepSpeed's optimizer, or a plain one at stage 0.
        zero_stage: Its ZeRO stage.
        parameters: The trained parameters, to which the states of a plain optimizer belong.
        counters: Numbers, or tensors with one element.
        keys: Names of the optimizer's tensors per weight.
    """
    flats: Sequence[torch.Tensor] = parameters
    if zero_stage in (1, 2):
        flats = optimizer.single_partition_of_fp32_groups
    elif zero_stage == 3:
        flats = optimizer.fp32_partitioned_groups_flat
    states = optimizer.optimizer.state if zero_stage else optimizer.state
    for flat in flats if keys else ():
        copies = {key: value.clone() if torch.is_tensor(value) else value for key, value in counters.items()}
        states[flat] = copies | {key: torch.zeros_like(flat, dtype=torch.float32) for key in keys}
    if zero_stage in (1, 2) and keys:
        optimizer._lazy_init_hp_params_optimizer_state()
