"""Two hands inside DeepSpeed's ZeRO optimizers: one on the gradient's norm before it is applied, one on their states.

DeepSpeed tells the norm of a step's gradients only when the step is over, and what it does about one that is not finite
depends on the precision and the stage. All its ZeRO optimizers skip a step whose norm is not a number, on all ranks
alike, and clear up after it: the watch looks at the norm on its way, and hands on infinity in place of one that is not
wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class NormWatch:
    """Sees the global gradient norm before the update, and can have the update dropped.

    Args:
        optimizer: DeepSpeed's, already made; a plain one at stage 0, where the engine asks `accepts` itself.
        zero_stage: Its ZeRO stage.
    """

    def __init__(self, optimizer: Any, zero_stage: int):
        self.norm: float | None = None
        """Of the last step, unscaled, before clipping; infinite where it was not finite."""
        self._limit, self._scale = math.inf, 1.0
        if zero_stage in (1, 2):
            norm_of = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda *args, **options: self._filtered([norm_of(*args, **options)])[0]
        elif zero_stage == 3:
            norms_of = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: self._filtered(norms_of())
        if hasattr(getattr(optimizer, "loss_scaler", None), "raise_error_at_min_scale"):
            optimizer.loss_scaler.raise_error_at_min_scale = False  # the loop counts and names the steps that failed

    def begin(self, limit: float, scale: float) -> None:
        """Before an update: what its norm may be at most, and the factor that the gradients carry."""
        self._limit, self._scale = limit, scale
        self.norm = math.inf  # where DeepSpeed finds an overflow first, it takes no norm

    def accepts(self, norm: float) -> bool:
        """Remembers a norm, and says whether it may be applied."""
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
    """Makes the states that an optimizer has after its first step: `counters` as they are, zeros for `keys`.

    Args:
        optimizer: DeepSpeed's, or a plain one at stage 0.
        zero_stage: Its ZeRO stage.
        parameters: The trained ones, which the states of a plain optimizer belong to.
        counters: Plain numbers or tensors of one number.
        keys: Names of the tensors beside each weight.
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
