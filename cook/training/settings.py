"""Filling in the user's DeepSpeed config: precision, batch sizes, `auto` values."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from cook.base.device import has_fast_bf16
from cook.base.errors import UserError, UserErrors
from cook.config.schema import shown
from cook.config.types import TrainingConfig
from cook.training.deepspeed_checks import deepspeed_mistakes, offloads

AUTO = "auto"
# The objects of the DeepSpeed config that are read here, and the objects inside them.
SECTIONS: dict[str, tuple[str, ...]] = {"bf16": (), "fp16": (), "optimizer": ("params",), "scheduler": ("params",)}
SECTIONS |= {"zero_optimization": ("offload_optimizer", "offload_param")}


def resolve_precision(training: TrainingConfig, deepspeed_config: Mapping[str, Any]) -> str:
    """`fp32`, `bf16` or `fp16`: from `training`, else from the DeepSpeed config, else the best for the device."""
    enabled = [name for name in ("bf16", "fp16") if deepspeed_config.get(name, {}).get("enabled") is True]
    if training.precision != AUTO:
        if enabled and enabled != [training.precision]:
            raise UserError(
                f"training.precision is {training.precision}, but the DeepSpeed config enables {enabled[0]}",
                remedy='write "enabled": "auto" in the DeepSpeed config',
            )
        return training.precision
    if enabled:
        return enabled[0]
    return "bf16" if has_fast_bf16() else "fp32"


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
    config["bf16"]["check_grad_overflow"] = True  # without it bf16 would apply a gradient that is not finite
    zero = config.setdefault("zero_optimization", {})
    if zero.get("stage", AUTO) == AUTO:
        zero["stage"] = 2 if world_size > 1 else 0
    if zero["stage"] == 0 and precision != "fp32":
        # At stage 0 the fp32 masters can be neither set nor read. Stage 1 computes the same.
        zero["stage"] = 1
    for key in [k for k, v in zero.items() if v == AUTO]:
        del zero[key]  # for buckets and thresholds "auto" means DeepSpeed's default
    if not training.train_weights:
        config.pop("scheduler", None)  # it would raise the learning rate from 0
    if offloads(zero) and "optimizer" not in config:
        # Offloaded states need DeepSpeed's CPU Adam, which it builds from the config.
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
        raise UserError(f'deepspeed.{left[0]}: cook cannot fill in this "auto"', remedy="set a value")
    return config


def check_settings(training: TrainingConfig, deepspeed_config: Mapping[str, Any], *, world_size: int) -> dict[str, Any]:
    """Fills in and checks the DeepSpeed config, before anything is built or written; raises UserErrors."""
    mistakes = list(_misshapen(deepspeed_config))
    if not mistakes:
        precision = resolve_precision(training, deepspeed_config)
        config = filled_config(deepspeed_config, training, world_size=world_size, precision=precision)
        mistakes = deepspeed_mistakes(config) if deepspeed_config or precision == "fp16" else []
        if not mistakes:
            return config
    raise UserErrors("the DeepSpeed configuration cannot be used", mistakes)


def _misshapen(config: Mapping[str, Any]) -> Iterator[UserError]:
    """Values that cook cannot read."""
    sections: dict[str, Any] = {}
    for name, keys in SECTIONS.items():
        section = config.get(name, {})
        inner = section if isinstance(section, dict) else {}
        sections |= {name: section} | {f"{name}.{key}": inner[key] for key in keys if inner.get(key) is not None}
    for place, value in sections.items():
        if not isinstance(value, dict):
            yield UserError(f"deepspeed.{place}: not an object", got=shown(value))
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", AUTO) if isinstance(zero, dict) else AUTO
    if stage != AUTO and (type(stage) is not int or stage not in range(4)):
        wanted = '0, 1, 2, 3 or "auto"'
        yield UserError("deepspeed.zero_optimization.stage: no such stage", wanted=wanted, got=shown(stage))


def _autos(value: Any, place: str = "") -> list[str]:
    if isinstance(value, Mapping):
        return [hit for key, item in value.items() for hit in _autos(item, f"{place}.{key}".lstrip("."))]
    return [place] if value == AUTO else []
