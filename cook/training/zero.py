"""Access to what DeepSpeed's ZeRO partitions: weights, optimizer states and gradient norms; zeros that stay zero."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F

from cook.base import distributed
from cook.base.errors import UserError

ELEMENTWISE = frozenset({"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "SGD", "Lion", "FusedLion", "Adagrad"})
"""Optimizers that do not change a weight of 0 whose gradient and moments are 0."""


def exact_buffers(model: torch.nn.Module, build: Callable[[], torch.nn.Module] | None) -> dict[str, torch.Tensor]:
    """Copies of the model's floating-point buffers with their exact values.

    Under half precision ZeRO-3 rounds buffers when it creates them. Rounded frequencies of rotary positions, for
    example, give wrong angles for distant tokens. `build` then makes a second model to copy from; None: not rounded.
    """
    named = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    if named and build is not None:
        named = {name: buffer for name, buffer in build().named_buffers() if name in named}
    return {name: buffer.detach().clone() for name, buffer in named.items()}


def freeze_all_but_smallest(model: torch.nn.Module) -> None:
    # The engine needs at least one parameter: the smallest one stays trainable, with a learning rate of 0.
    smallest = min(model.parameters(), key=lambda p: getattr(p, "ds_numel", p.numel()))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is smallest)


def read_from_disk_when_needed(optimizer: Any) -> None:
    """Has DeepSpeed's optimizer hold no weights that are on a disk (`offload_param` to NVMe) beyond their use.

    DeepSpeed 0.19 reads ahead, and asks twice for a weight that is used twice soon, such as those of the last layer,
    whose backward pass follows its forward pass; the second request fails. It also keeps weights that are used again
    soon, until it has no buffer left for the next one.
    """
    offload = getattr(optimizer, "parameter_offload", None)
    if offload is not None and offload.offload_device == "nvme":
        coordinator = offload.get_param_coordinator()
        coordinator._PartitionedParameterCoordinator__prefetch_nvme = False
        coordinator._PartitionedParameterCoordinator__max_reuse_dist_in_numel = 0


def fit_disk_buffers(zero: dict[str, Any], build: Callable[[], torch.nn.Module], world_size: int) -> None:
    """Sizes DeepSpeed's buffers for weights on a disk: each holds one rank's part of any weight, in numbers.

    DeepSpeed's default, 100 million, is too small for the embedding of a large model on few ranks, and fills 2 GB of
    memory for a small one.

    Args:
        zero: The section `zero_optimization`, which gets the size if it has none.
        build: Builds the model.
        world_size: The number of ranks.

    Raises:
        UserError: The section has a size that is too small.
    """
    offload = zero.get("offload_param") or {}
    if offload.get("device") != "nvme":
        return
    with torch.device("meta"):
        name, largest = max(build().named_parameters(), key=lambda named: named[1].numel())
    needed = -(-largest.numel() // world_size)
    if offload.setdefault("buffer_size", needed) < needed:
        raise UserError(
            f"deepspeed.zero_optimization.offload_param.buffer_size: {name} does not fit on {world_size} rank(s)",
            wanted=f"at least {needed}",
            got=offload["buffer_size"],
            remedy="leave it out, or use more ranks",
        )


class Partitions:
    """Operations on one parameter at a time, on all ranks together. The engine imports the module `deepspeed`."""

    def __init__(self, deepspeed: Any, zero_stage: int, device: torch.device):
        self._deepspeed, self._zero_stage, self._device = deepspeed, zero_stage, device

    def gathered(self, parameter: torch.nn.Parameter, *, modified: bool = False):
        """A context in which the parameter is whole; `modified`: rank 0's changes are then sent to all ranks."""
        if self._zero_stage != 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modified else None)

    def load(self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        """Copies `weights` into all parameters; every rank raises a UserError if names or shapes do not match."""
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in weights}
        names = {name for name, _ in model.named_parameters()} | set(buffers)
        if names != set(weights):
            missing, unexpected = sorted(names - set(weights)), sorted(set(weights) - names)
            raise UserError(
                "the weights do not fit the model's config",
                wanted=f"{len(names)} tensors" + (f", among them {missing[0]}" if missing else ""),
                got=f"{len(weights)} tensors" + (f", among them {unexpected[0]}" if unexpected else ""),
            )
        error: UserError | None = None
        for name, buffer in buffers.items():
            error = error or _copy_into(buffer, weights, name)
        for name, parameter in model.named_parameters():
            with self.gathered(parameter, modified=True), torch.no_grad():
                if self._zero_stage != 3 or distributed.rank() == 0:
                    error = error or _copy_into(parameter, weights, name)
        # Under ZeRO 3 only the first rank reads; on an error the other ranks must not wait for it.
        error = next((e for e in distributed.gather(error) if e), None)
        if error:
            raise error

    def set_optimized(self, parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
        """Sets this rank's part of a parameter's fp32 master, or optimizer tensor `key`, from the whole tensor."""
        tools, value = self._deepspeed.utils, value.float().flatten().to(self._device)
        if self._zero_stage == 3:
            # If a parameter does not divide evenly, the last rank's share is padded.
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
        """The fp32 master, or the parameter itself if it has none, whole and on the CPU."""
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
        what = f"{name} has another shape than in the model's config"
        return UserError(what, wanted=tuple(parameter.shape), got=tuple(tensor.shape))
    parameter.copy_(tensor)
    return None


class HeldZeros:
    """Keeps pruned weights exactly 0 at any ZeRO stage: the weights, their fp32 masters, gradients and moments.

    The gradients are set to 0 where they are computed, before any reduction, clipping or sharding. So the moments of
    pruned entries stay 0 and an elementwise optimizer never changes them; for others, `restore` resets the weights.

    `masks` are true where a weight is kept, and the same on every rank. In the context `gathered` a parameter is whole.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        masks: Mapping[str, torch.Tensor],
        optimizer: Any,
        gathered: Callable[..., AbstractContextManager[Any]],
    ):
        unexpected = sorted(masks.keys() - parameters.keys())
        assert not unexpected, f"a mask for {unexpected[0]}, which the model lacks"
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
            pruned_here = pruned.flatten()[piece.numel() * rank :][: piece.numel()]
            value = piece.clone().flatten()
            value[: len(pruned_here)].masked_fill_(pruned_here, 0.0)  # the last rank's piece may be padded
            engine.set_local_hp_param(value.view_as(piece), parameter, key)


def _cut_fragment(parameter: Any, pruned: torch.Tensor) -> None:
    """ZeRO 1 and 2: resets this rank's part of the parameter in the flat master and in the moments."""
    mapping = parameter._hp_mapping
    address = mapping.lp_fragment_address
    pruned_here = pruned.flatten()[address.start :][: address.numel]
    for fragment in (mapping.hp_fragment, *(mapping.optim_fragment or {}).values()):
        fragment.masked_fill_(pruned_here.to(fragment.device), 0.0)


def _is_moment(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() > 1


class NormWatch:
    """Reads the global gradient norm before an update, and can prevent the update.

    DeepSpeed reports the norm only after the step, and its handling of a norm that is not finite depends on the
    precision and the ZeRO stage. But all its ZeRO optimizers skip a step whose norm is not finite, on all ranks, and
    clean up after it. So the hook returns infinity in place of a norm that is not accepted.

    At stage 0 the optimizer is a plain one, and the engine calls `accepts` itself.
    """

    def __init__(self, optimizer: Any, zero_stage: int):
        self.norm: float | None = None  # of the last step, unscaled, before clipping; infinite if it was not finite
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
    inner = optimizer.optimizer if zero_stage else optimizer
    # PyTorch's fused optimizers count steps on the device of the weights, the others on the CPU.
    on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    states = inner.state
    for flat in flats if keys else ():
        place = flat.device if on_device else None
        copies = {k: v.to(place, copy=True) if torch.is_tensor(v) else v for k, v in counters.items()}
        states[flat] = copies | {key: torch.zeros_like(flat, dtype=torch.float32) for key in keys}
    if zero_stage in (1, 2) and keys:
        optimizer._lazy_init_hp_params_optimizer_state()
