"""What the user's DeepSpeed config becomes before DeepSpeed sees it: precision, batch sizes, `auto` values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from cook.base.errors import UserError
from cook.config.types import TrainingConfig

AUTO = "auto"


def resolve_precision(training: TrainingConfig, deepspeed_config: Mapping[str, Any]) -> str:
    """`fp32`, `bf16` or `fp16`: what `training` says, else the DeepSpeed config, else what suits the device."""
    asked = [name for name in ("bf16", "fp16") if deepspeed_config.get(name, {}).get("enabled") is True]
    if training.precision != AUTO:
        if asked and asked != [training.precision]:
            raise UserError(
                f"training.precision is {training.precision}, but the DeepSpeed config enables {asked[0]}",
                remedy='write "enabled": "auto" in the DeepSpeed config',
            )
        return training.precision
    if asked:
        return asked[0]
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    # A CPU without these instructions would emulate bf16 at a fraction of fp32's speed.
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def filled_config(
    deepspeed_config: Mapping[str, Any], training: TrainingConfig, *, world_size: int, precision: str
) -> dict[str, Any]:
    """The user's DeepSpeed config with its `auto` values and the batch sizes filled in from `training`."""
    config = copy.deepcopy(dict(deepspeed_config))
    micro = training.rows_at_once(world_size)
    config |= {
        "train_batch_size": training.train_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": training.train_batch_size // (micro * world_size),
    }
    if config.get("gradient_clipping", AUTO) == AUTO:
        config["gradient_clipping"] = training.clip
    for name in ("bf16", "fp16"):
        config[name] = {**config.get(name, {}), "enabled": precision == name}
    config["bf16"]["check_grad_overflow"] = True  # else bf16 would apply a gradient that is not finite
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage", AUTO) == AUTO:
        zero["stage"] = 2 if world_size > 1 else 0
    if zero["stage"] == 0 and precision != "fp32":
        # Stage 0 keeps its fp32 masters out of reach: they could neither be set nor read. Stage 1 computes the same.
        zero["stage"] = 1
    for key in [k for k, v in zero.items() if v == AUTO]:
        del zero[key]  # DeepSpeed's own default is what "auto" means for buckets and thresholds
    if not training.train_weights:
        config.pop("scheduler", None)  # it would raise the learning rate from 0
    if _offloads(zero) and "optimizer" not in config:
        # Offloaded states need DeepSpeed's own CPU Adam, which it builds from the config.
        config["optimizer"] = {"type": "AdamW", "params": {"betas": AUTO, "eps": AUTO}}
    if "optimizer" in config:
        parameters = config["optimizer"].setdefault("params", {})
        parameters |= {key: AUTO for key in ("lr", "weight_decay") if key not in parameters}
    parameters = config.get("optimizer", {}).get("params", {})
    values = {
        "lr": training.learning_rate,
        "weight_decay": training.weight_decay,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "warmup_num_steps": max(1, round(training.warmup * training.steps)),
        "warmup_max_lr": training.learning_rate,
        "warmup_min_lr": 0.0,
        "total_num_steps": training.steps,
    }
    for section in (parameters, config.get("scheduler", {}).get("params", {})):
        section |= {key: values[key] for key, value in section.items() if value == AUTO and key in values}
    config.setdefault("steps_per_print", 10**9)
    left = _autos(config)
    if left:
        raise UserError(f'DeepSpeed config: cook has no value for the "auto" at {left[0]}', remedy="write a value")
    return config


def check_settings(training: TrainingConfig, deepspeed_config: Mapping[str, Any], *, world_size: int) -> dict[str, Any]:
    """The filled-in DeepSpeed config, made before anything is built or written.

    Raises:
        UserError: an `auto` that has no value here, or a precision that contradicts the DeepSpeed config.
    """
    precision = resolve_precision(training, deepspeed_config)
    return filled_config(deepspeed_config, training, world_size=world_size, precision=precision)


def _offloads(zero: Mapping[str, Any]) -> bool:
    return zero.get("offload_optimizer", {}).get("device", "none") != "none"


def _autos(value: Any, place: str = "") -> list[str]:
    if isinstance(value, Mapping):
        return [hit for key, item in value.items() for hit in _autos(item, f"{place}.{key}".lstrip("."))]
    return [place] if value == AUTO else []
