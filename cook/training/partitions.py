"""Whole tensors in and out of a model whose weights and optimizer states ZeRO has shared out among the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from cook.base import distributed
from cook.base.errors import UserError


class Partitions:
    """What is done to one parameter at a time, on all ranks together.

    Args:
        deepspeed: The library, which only the engine imports.
        zero_stage: The engine's ZeRO stage.
        device: The engine's device.
    """

    def __init__(self, deepspeed: Any, zero_stage: int, device: torch.device):
        self._deepspeed, self._zero_stage, self._device = deepspeed, zero_stage, device

    def gathered(self, parameter: torch.nn.Parameter, *, modified: bool = False):
        """A context in which the parameter is whole; `modified`: what rank 0 makes of it is then shared out again."""
        if self._zero_stage != 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modified else None)

    def load(self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        """Copies `weights` into all parameters.

        Raises:
            UserError: on every rank; names or shapes are not the model's.
        """
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in weights}
        names = {name for name, _ in model.named_parameters()} | set(buffers)
        if names != set(weights):
            lacking, strange = sorted(names - set(weights)), sorted(set(weights) - names)
            raise UserError(
                "the weights do not fit the model's config",
                wanted=f"{len(names)} tensors" + (f", among them {lacking[0]}" if lacking else ""),
                got=f"{len(weights)} tensors" + (f", among them {strange[0]}" if strange else ""),
            )
        error: UserError | None = None
        for name, buffer in buffers.items():
            error = error or _copy_into(buffer, weights, name)
        for name, parameter in model.named_parameters():
            with self.gathered(parameter, modified=True), torch.no_grad():
                if self._zero_stage != 3 or distributed.rank() == 0:
                    error = error or _copy_into(parameter, weights, name)
        # Under ZeRO 3 only the first rank reads: it must not leave the others waiting for it.
        error = next((e for e in distributed.gather(error) if e), None)
        if error:
            raise error

    def set_optimized(self, parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
        """Gives this rank its part of a parameter's whole fp32 master, or of the optimizer's tensor `key` beside it."""
        tools, value = self._deepspeed.utils, value.float().flatten().to(self._device)
        if self._zero_stage == 3:
            # The last rank's share of a parameter that does not divide is padded.
            share = -(-value.numel() // distributed.world_size())
            value = F.pad(value, (0, share * distributed.world_size() - value.numel()))
            value = value.narrow(0, share * distributed.rank(), share)
            if key is None:
                tools.safe_set_local_fp32_param(parameter, value)
            else:
                tools.safe_set_local_optimizer_state(parameter, value, key)
        elif key is None:
            tools.safe_set_full_fp32_param(parameter, value)
        else:
            tools.safe_set_full_optimizer_state(parameter, value, key)

    def whole(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The fp32 master, or the parameter itself where it has none, whole on the CPU."""
        master = self._deepspeed.utils.safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if master is not None:
            return master.detach().float().cpu()
        with self.gathered(parameter):
            return parameter.detach().float().cpu().clone()


def _copy_into(parameter: torch.Tensor, weights: Mapping[str, torch.Tensor], name: str) -> UserError | None:
    try:
        tensor = weights[name]
    except UserError as error:
        return error
    if tensor.shape != parameter.shape:
        return UserError(
            f"{name} has another shape than the model's config says",
            wanted=tuple(parameter.shape),
            got=tuple(tensor.shape),
        )
    parameter.copy_(tensor)
    return None
