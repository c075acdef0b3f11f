"""Keeps pruned weights exactly 0: in the weights, their fp32 masters, the gradients and the moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

ELEMENTWISE = frozenset({"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "SGD", "Lion", "FusedLion", "Adagrad"})
"""Optimizers that do not change a weight of 0 whose gradient and moments are 0."""

Gathered = Callable[..., AbstractContextManager[Any]]


class HeldZeros:
    """Applies masks to the parameters of an engine, at any ZeRO stage.

    The gradients are set to 0 where they are computed, before any reduction, clipping or sharding. So the moments of
    pruned entries stay 0 and an elementwise optimizer never changes them; for others, `restore` resets the weights.

    Args:
        parameters: The parameters of the engine's module, by name.
        masks: By name; true where a weight is kept; the same on every rank.
        optimizer: The engine's optimizer.
        gathered: A context in which a parameter is whole (ZeRO 3).
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        masks: Mapping[str, torch.Tensor],
        optimizer: Any,
        gathered: Gathered,
    ):
        strange = sorted(masks.keys() - parameters.keys())
        assert not strange, f"a mask for {strange[0]}, which the model lacks"
        self._pruned = {parameters[name]: mask == 0 for name, mask in masks.items()}
        self._gathered = gathered
        self._base = getattr(optimizer, "optimizer", optimizer)
        for parameter, pruned in self._pruned.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            assert pruned.shape == shape, f"a mask of shape {tuple(pruned.shape)} for one of {tuple(shape)}"
            self._pruned[parameter] = pruned.to(parameter.device)
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, at=parameter: gradient.masked_fill(self._pruned[at], 0.0))

    @property
    def can_be_left(self) -> bool:
        """Whether the optimizer might change a weight of 0 whose gradient and moments are 0."""
        return type(self._base).__name__ not in ELEMENTWISE

    @torch.no_grad()
    def restore(self) -> None:
        """Sets the pruned weights, their masters and their moments to 0."""
        for parameter, pruned in self._pruned.items():
            with self._gathered(parameter, modified=True):
                parameter.masked_fill_(pruned, 0.0)
            if hasattr(parameter, "ds_id"):
                self._cut_sharded(parameter, pruned)
            elif getattr(parameter, "_hp_mapping", None) is not None:
                _cut_fragment(parameter, pruned)
            for value in self._base.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == pruned.shape:
                    value.masked_fill_(pruned, 0.0)

    def _cut_sharded(self, parameter: Any, pruned: torch.Tensor) -> None:
        """ZeRO 3: resets this rank's flat piece of the master and of every moment."""
        engine = parameter._z3_optimizer
        moments = {key for state in self._base.state.values() for key, v in state.items() if _is_moment(v)}
        for key in (None, *sorted(moments)):
            piece = engine.get_local_fp32_param(parameter, key)
            rank = engine._get_param_partition_rank(parameter)
            mine = pruned.flatten()[piece.numel() * rank :][: piece.numel()]
            value = piece.clone().flatten()
            value[: len(mine)].masked_fill_(mine, 0.0)  # the last rank's piece may be padded
            engine.set_local_hp_param(value.view_as(piece), parameter, key)


def _cut_fragment(parameter: Any, pruned: torch.Tensor) -> None:
    """ZeRO 1 and 2: resets this rank's part of the parameter in the flat master and in the moments."""
    mapping = parameter._hp_mapping
    address = mapping.lp_fragment_address
    mine = pruned.flatten()[address.start :][: address.numel]
    for fragment in (mapping.hp_fragment, *(mapping.optim_fragment or {}).values()):
        fragment.masked_fill_(mine.to(fragment.device), 0.0)


def _is_moment(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() > 1
