"""Import of DeepSpeed, and checks of its config before an engine is made."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch

from cook.base.device import accelerator, default_device
from cook.base.errors import UserError
from cook.config.schema import shown
from cook.training.deepspeed_builds import announced, first_line, is_built

# Deprecated keys of ZeRO; DeepSpeed replaces them only after cook has read the config.
OFFLOADED_KEYS = ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory")
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@cache
def import_deepspeed() -> Any:
    """Imports DeepSpeed with its log silenced and with a message for every op that it builds."""
    if accelerator() is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.ops.op_builder.builder import OpBuilder

    # It configures its logger at import, and prints a page of settings at every start.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    OpBuilder.jit_load = announced(OpBuilder.jit_load)
    return deepspeed


@contextlib.contextmanager
def refusals(deepspeed_config: Mapping[str, Any]) -> Iterator[None]:
    """Turns errors that DeepSpeed raises for the user's config while it makes an engine into a UserError."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        keys = sorted(deepspeed_config.keys() - set(BATCH_KEYS))
        if not keys:
            raise  # not caused by any value of the user's
        raise UserError(
            f"deepspeed: DeepSpeed cannot make an engine of this configuration: {first_line(error)}",
            got=", ".join(f"deepspeed.{key}" for key in keys),
            remedy="remove one key at a time to find the one that it cannot use",
        ) from error


def deepspeed_mistakes(config: Mapping[str, Any]) -> list[UserError]:
    """The errors in a config whose `auto` values are filled in; each error names its key."""
    import_deepspeed()
    zero = {"zero_optimization": config["zero_optimization"]}
    found = [*_old_keys(zero["zero_optimization"]), *_refused("zero_optimization", zero)]
    beside = {} if found else zero  # some keys are allowed at some ZeRO stages only
    found += [error for key in config.keys() - zero.keys() for error in _refused(key, {**beside, key: config[key]})]
    if not found:
        found += _refused("", dict(config))
    if not found:
        for check in (_precision, _zero, _numbers, _monitors, _optimizer, _scheduler):
            found += check(config)
    return found


def _refused(key: str, config: dict[str, Any]) -> Iterator[UserError]:
    """The errors of DeepSpeed's own config classes."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    place = f"deepspeed.{key}".rstrip(".")
    try:
        # Its check of the batch sizes depends on the world size; cook makes its own check.
        rest = {key: value for key, value in config.items() if key not in BATCH_KEYS}
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, **rest})
    except ValidationError as refusal:
        for error in refusal.errors():
            keys = [str(part) for part in error["loc"]]
            keys = keys[1:] if keys[:1] == [key] else keys
            unknown = error["type"] == "extra_forbidden"
            message = error["msg"].removeprefix("Value error, ")
            what = "unknown key" if unknown else message[:1].lower() + message[1:]
            got = None if unknown or isinstance(error["input"], dict) else repr(error["input"])
            yield UserError(f"{'.'.join([place, *keys])}: {what}", got=got)
    except (AttributeError, TypeError, ArithmeticError):
        yield UserError(f"{place}: DeepSpeed cannot use this value", got=shown(config.get(key)))
    except Exception as refusal:  # DeepSpeed raises many kinds of errors
        yield UserError(f"{place}: DeepSpeed cannot use this: {first_line(refusal)}", got=shown(config.get(key)))


def _old_keys(zero: Any) -> Iterator[UserError]:
    for key in OFFLOADED_KEYS if isinstance(zero, dict) else ():
        if key in zero:
            remedy = 'write "offload_optimizer": {"device": "cpu"} or "offload_param": {"device": "cpu"}'
            yield UserError(f"deepspeed.zero_optimization.{key}: a deprecated key", got=zero[key], remedy=remedy)


def _precision(config: Mapping[str, Any]) -> Iterator[UserError]:
    from deepspeed.accelerator import get_accelerator

    supported = {"fp16": get_accelerator().is_fp16_supported, "bf16": get_accelerator().is_bf16_supported}
    for name, is_supported in supported.items():
        if config[name]["enabled"] and not is_supported():
            yield UserError(
                f"deepspeed.{name}.enabled, training.precision: this device cannot train in {name}",
                wanted=f"fp32, auto or {'bf16' if name == 'fp16' else 'fp16'}",
                got=name,
                remedy="choose another precision, or check the config on the device that will run it",
            )
    dtype = "fp16" if config["fp16"]["enabled"] else "bf16" if config["bf16"]["enabled"] else "fp32"
    types = config.get("data_types", {})
    stage = config["zero_optimization"]["stage"]
    for key, accepted in (
        ("param_dtype", (None, dtype)),
        ("grad_accum_dtype", (None, dtype) if stage == 0 else (None, "fp32", "bf16", "fp16")),
    ):
        if types.get(key) not in accepted:
            wanted = f"left out, or {', '.join(name for name in accepted if name)}"
            yield UserError(
                f"deepspeed.data_types.{key}: does not fit the precision", wanted=wanted, got=shown(types[key])
            )


def _zero(config: Mapping[str, Any]) -> Iterator[UserError]:
    from deepspeed.accelerator import get_accelerator

    zero = config["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key) or {}
        least = 3 if key == "offload_param" else 1
        if offload.get("device", "none") != "none" and zero["stage"] < least:
            what = f"deepspeed.zero_optimization.{key}: {offload['device']} has no effect at ZeRO stage {zero['stage']}"
            yield UserError(
                what, wanted="stage 3" if least == 3 else "stage 1, 2 or 3", remedy="raise the stage, or remove it"
            )
        elif key == "offload_optimizer" and offload.get("device") == "nvme":
            what = "deepspeed.zero_optimization.offload_optimizer.device: a run with nvme cannot be resumed"
            got = "a checkpoint of DeepSpeed 0.19 does not restore an optimizer on NVMe exactly"
            yield UserError(what, wanted='"cpu"; weights can be on NVMe: "offload_param"', got=got)
        elif offload.get("device") == "nvme" and not offload.get("nvme_path"):
            yield UserError(f"deepspeed.zero_optimization.{key}.nvme_path: missing", wanted="a folder on the device")
        elif offload.get("device") == "nvme":
            yield from _unbuildable("AsyncIOBuilder", f"deepspeed.zero_optimization.{key}.device: nvme", NO_NVME)
    if zero.get("legacy_stage1"):
        yield UserError("deepspeed.zero_optimization.legacy_stage1: no longer supported", remedy="remove it")
    if zero.get("zenflow") is not None and not offloads(zero):
        what = "deepspeed.zero_optimization.zenflow: needs the optimizer to be offloaded"
        yield UserError(what, wanted='"offload_optimizer": {"device": "cpu"}')
    quantized = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key)]
    builder = get_accelerator().get_op_builder("QuantizerBuilder")
    if quantized and zero["stage"] == 3 and (builder is None or builder.__name__ == "NotImplementedBuilder"):
        yield UserError(f"deepspeed.zero_optimization.{quantized[0]}: not available on this device", wanted=False)
    if zero["stage"] >= 2 and zero.get("reduce_scatter", True):
        for key, neutral in (("gradient_predivide_factor", 1.0), ("prescale_gradients", False)):
            if config.get(key, neutral) != neutral:
                what = f"deepspeed.{key}: not possible at ZeRO stage {zero['stage']} with reduce_scatter"
                yield UserError(what, wanted=str(neutral).lower(), got=shown(config[key]))


def _numbers(config: Mapping[str, Any]) -> Iterator[UserError]:
    """Values that DeepSpeed's classes accept without a check and that would stop a run later."""
    from deepspeed.utils.logging import log_levels

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    def factor(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0

    profiler = "flops_profiler"
    for keys, fits, wanted in (
        (("steps_per_print",), lambda value: value is None or whole(value), "an integer at least 1"),
        (("gradient_predivide_factor",), factor, "a number above 0"),
        (("gradient_clipping",), lambda value: value in (None, 0) or factor(value), "a number at least 0"),
        (("vocabulary_size",), lambda value: value is None or whole(value), "an integer at least 1"),
        (("log_level",), lambda value: value is None or value in log_levels, "one of " + ", ".join(log_levels)),
        (("sequence_parallel_size",), lambda value: value == 1, "1: cook does not split sequences"),
        (("tensor_parallel", "autotp_size"), lambda value: value in (0, 1), "1: cook does not split matrices"),
        (("checkpoint", "load_universal"), lambda value: value is False, "false: cook resumes on any number of ranks"),
        (("checkpoint", "writer"), lambda value: value is None, "left out: cook writes the checkpoints"),
        (("datastates_ckpt",), lambda value: value is None, "left out: cook writes the checkpoints"),
        ((profiler, "profile_step"), whole, "an integer at least 1"),
        ((profiler, "module_depth"), lambda value: isinstance(value, int), "an integer"),
        ((profiler, "top_modules"), whole, "an integer at least 1"),
    ):
        node: Any = config
        for key in keys[:-1]:
            node = node.get(key, {})
        if keys[-1] in node and not fits(node[keys[-1]]):
            yield UserError(f"deepspeed.{'.'.join(keys)}: not a valid value", wanted=wanted, got=shown(node[keys[-1]]))


def _monitors(config: Mapping[str, Any]) -> Iterator[UserError]:
    packages = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}
    for key, package in packages.items():
        if config.get(key, {}).get("enabled") and importlib.util.find_spec(package) is None:
            yield UserError(f"deepspeed.{key}.enabled: {package} is not installed", remedy=f"pip install {package}")


def _optimizer(config: Mapping[str, Any]) -> Iterator[UserError]:
    """Checks the optimizer: tries it on two small parameters if torch has it, else checks its arguments."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if "optimizer" not in config:
        return
    section, zero = config["optimizer"], config["zero_optimization"]
    name, place = section.get("type"), "deepspeed.optimizer.type"
    known = [*DEEPSPEED_OPTIMIZERS, *_classes(torch.optim, torch.optim.Optimizer)]
    if not isinstance(name, str) or (name.lower() not in DEEPSPEED_OPTIMIZERS and name not in known):
        yield _unknown(f"{place}: there is no such optimizer", name, known, known)
        return
    values = dict(section.get("params") or {})
    if "max_grad_norm" in values:
        remedy = "write gradient_clipping"
        yield UserError("deepspeed.optimizer.params.max_grad_norm: not a key of DeepSpeed", remedy=remedy)
        return
    made: Callable[..., Any] | None = getattr(torch.optim, name, None)
    ops = optimizer_ops(config)
    if name.lower() in DEEPSPEED_OPTIMIZERS:
        made = {"adagrad": torch.optim.Adagrad}.get(name.lower())
        if name.lower().startswith("mu") and name.lower() != "muon" and importlib.util.find_spec("mup") is None:
            yield UserError(f"{place}: {name} needs the package mup", got=name, remedy="pip install mup")
            return
        if name.lower() == "lamb" and not (config["fp16"]["enabled"] and not config["fp16"].get("loss_scale")):
            yield UserError(f"{place}: {name} needs fp16 with a dynamic loss scale", got=name)
            return
        if name.lower() in ("adam", "adamw"):
            own = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")
            values = {key: value for key, value in values.items() if key not in own}
            made = torch.optim.AdamW
    for op in ops:
        yield from _unbuildable(op, f"{place}: {name}", NO_OPTIMIZER)
    if made is not None and (tried := _tried(made, values)) is not None:
        yield UserError(f"deepspeed.optimizer: {name} cannot be created: {tried}", got=shown(values))
    elif made is not None and zero["stage"] and not ops and made not in ZERO_SUPPORTED_OPTIMIZERS:
        if not config.get("zero_allow_untested_optimizer"):
            remedy = 'set "zero_allow_untested_optimizer": true, or choose AdamW'
            yield UserError(f"{place}: DeepSpeed has not tested {name} with ZeRO", got=name, remedy=remedy)


def _scheduler(config: Mapping[str, Any]) -> Iterator[UserError]:
    """Checks the scheduler: tries it on a small optimizer."""
    from deepspeed.runtime import lr_schedules

    section = config.get("scheduler", {})
    name, place = section.get("type"), "deepspeed.scheduler"
    if name is None:
        return
    known = {key: getattr(lr_schedules, key) for key in lr_schedules.VALID_LR_SCHEDULES}
    known = _classes(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler) | known
    if name not in known:
        yield _unknown(f"{place}.type: there is no such schedule", name, known, lr_schedules.VALID_LR_SCHEDULES)
        return
    if not isinstance(section.get("params"), dict):
        yield UserError(f"{place}.params: missing", wanted=f"the settings of {name}")
        return
    made = known[name]
    tried = _tried(lambda params, **values: made(torch.optim.AdamW(params), **values), section["params"])
    if tried is not None:
        yield UserError(f"{place}: {name} cannot be created: {tried}", got=shown(section["params"]))


def _unknown(what: str, name: Any, known: Iterable[str], listed: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    remedy = f"did you mean {near[0]!r}?" if near else None
    return UserError(what, wanted=", ".join(listed), got=shown(name), remedy=remedy)


def _classes(module: Any, base: type) -> dict[str, Any]:
    found = {name: made for name, made in vars(module).items() if inspect.isclass(made) and issubclass(made, base)}
    return {name: made for name, made in found.items() if made is not base and not name.startswith("_")}


def _tried(make: Callable[..., Any], values: Mapping[str, Any]) -> str | None:
    """The error of creating an optimizer or scheduler and making one step; None if there is none."""
    parameters = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(parameters, **values).step()
    except Exception as error:  # a user's value may cause any error
        return first_line(error)
    return None


def offloads(zero: Mapping[str, Any]) -> bool:
    """Whether the optimizer's states are kept outside the device."""
    return (zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def optimizer_ops(config: Mapping[str, Any]) -> list[str]:
    """Names of the C++ ops that the optimizer of a config needs."""
    section = config.get("optimizer", {})
    offloaded, name = offloads(config["zero_optimization"]), str(section.get("type")).lower()
    if name in ("adam", "adamw", "muon") and not (section.get("params") or {}).get("torch_adam"):
        return ["CPUAdamBuilder" if offloaded else "FusedAdamBuilder"]
    if name == "adagrad" and offloaded:
        return ["CPUAdagradBuilder"]
    return {"lion": ["CPULionBuilder" if offloaded else "FusedLionBuilder"], "lamb": ["FusedLambBuilder"]}.get(name, [])


NO_OPTIMIZER = 'remove "optimizer" and "offload_optimizer": cook then uses torch\'s AdamW'
NO_NVME = 'install what is missing, or offload to "cpu"'


def _unbuildable(op: str, what: str, remedy: str) -> Iterator[UserError]:
    """Why DeepSpeed cannot build an op that `what` needs."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from torch.utils import cpp_extension

    builder = get_accelerator().create_op_builder(op)
    if builder is None or type(builder).__name__ == "NotImplementedBuilder":
        yield UserError(f"{what}: DeepSpeed has none for this device", remedy=remedy)
    elif not installed_ops.get(builder.name) and not is_built(builder.name):
        missing = [tool for tool in (os.environ.get("CXX", "c++"), "ninja") if shutil.which(tool) is None]
        if default_device().type == "cuda" and cpp_extension.CUDA_HOME is None:
            missing.append("CUDA's toolkit (nvcc)")
        if not missing and op == "AsyncIOBuilder" and not builder.is_compatible(verbose=False):
            missing.append("the library libaio with its headers (libaio-dev)")
        if missing:
            wanted = "a C++ compiler and ninja, for GPUs also nvcc, for NVMe also libaio"
            yield UserError(
                f"{what} needs C++ code that must be built first, and {missing[0]} is missing",
                wanted=wanted,
                remedy=remedy,
            )
