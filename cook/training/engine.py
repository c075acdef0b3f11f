"""The only file that imports DeepSpeed: builds an engine, reads and writes its weights and checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cook.base import distributed
from cook.base.errors import UserError
from cook.base.tensor_files import LazyTensors, load_pt
from cook.config.types import TrainingConfig
from cook.training.settings import check_settings, resolve_precision


def initialise_processes(threads: int | None) -> None:
    """Joins the process group of the launcher (or makes one of a single rank) and sets the CPU threads of this rank."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_ranks))
    deepspeed = _import_deepspeed()
    # DeepSpeed calls what torch has renamed, thousands of times.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.local_rank())
    else:
        # Its own collectives for CPUs would be compiled first, a minute and a compiler that a laptop may not have;
        # gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:  # no launcher: one rank on the loopback address, on a free port
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    # The others wait in a collective while the first rank tokenises a corpus or hashes a checkpoint.
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(hours=3), verbose=False)


def leave_processes() -> None:
    """Leaves the process group: a rank that ends without it is aborted while its connections still work."""
    if distributed.is_on():
        torch.distributed.destroy_process_group()


def _import_deepspeed():
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # It sets its own logger up at import, and prints a page of settings at every start.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Engine:
    """A model under DeepSpeed, with just the calls that the step, the loop and the checkpoints make.

    Args:
        build: Makes the model, freshly initialised.
        weights: Tensors to start from, read one at a time; None leaves the fresh ones.
        training: The stage's training section.
        deepspeed_config: The user's config, `auto` values included.
    """

    def __init__(
        self,
        build: Callable[[], torch.nn.Module],
        weights: Mapping[str, torch.Tensor] | None,
        training: TrainingConfig,
        deepspeed_config: Mapping[str, Any],
    ):
        deepspeed = _import_deepspeed()
        self._deepspeed = deepspeed
        self.precision = resolve_precision(training, deepspeed_config)
        world = distributed.world_size()
        self.config = check_settings(training, deepspeed_config, world_size=world)
        self.zero_stage: int = self.config["zero_optimization"]["stage"]
        self.accumulation: int = self.config["gradient_accumulation_steps"]
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", distributed.local_rank()) if cuda else torch.device("cpu")
        self._schedules_itself = "scheduler" in self.config
        self._norm: float | None = None
        self._clip: float | None = None
        if self.zero_stage == 0 and self.precision == "fp32":
            # Here DeepSpeed neither tells the gradient's norm nor stops at one that is not finite.
            self._clip, self.config["gradient_clipping"] = self.config["gradient_clipping"], 0.0
        self._frozen = weights if weights is not None and not training.train_weights else None

        model = self._partitioned(build) if self.zero_stage == 3 else build()
        buffers = _buffers(model, build if self.zero_stage == 3 else None)
        if weights is not None:
            self._load(model, weights)
        if training.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if not training.train_weights:
            _freeze_all_but_smallest(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=model,
            model_parameters=trained,
            optimizer=None if self._engine_makes_optimizer() else self._adamw(trained, training),
            config=self.config,
        )
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.module.get_submodule(owner), leaf, buffer.to(self.device))
        if weights is not None and self.precision != "fp32":
            self._load_masters(weights)

    def _partitioned(self, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        with self._deepspeed.zero.Init(config_dict_or_path=self.config):
            return build()

    def _engine_makes_optimizer(self) -> bool:
        return "optimizer" in self.config

    def _adamw(self, parameters: list[torch.nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters,
            lr=training.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=training.weight_decay,
            fused=True,
        )

    def _load(self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        names = {name for name, _ in model.named_parameters()}
        if names != set(weights):
            lacking, strange = sorted(names - set(weights)), sorted(set(weights) - names)
            raise UserError(
                "the weights do not fit the model's config",
                wanted=f"{len(names)} tensors" + (f", among them {lacking[0]}" if lacking else ""),
                got=f"{len(weights)} tensors" + (f", among them {strange[0]}" if strange else ""),
            )
        error: UserError | None = None
        for name, parameter in model.named_parameters():
            with self._gathered(parameter, modified=True), torch.no_grad():
                if self.zero_stage != 3 or distributed.rank() == 0:
                    error = error or _copy_into(parameter, weights, name)
        # Under ZeRO 3 only the first rank reads: it must not leave the others waiting for it.
        error = next((e for e in distributed.gather(error) if e), None)
        if error:
            raise error

    def _load_masters(self, weights: Mapping[str, torch.Tensor]) -> None:
        # The engine made its fp32 masters from parameters that had been rounded to half precision.
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                self._deepspeed.utils.safe_set_full_fp32_param(parameter, weights[name].float().to(self.device))

    def _gathered(self, parameter: torch.nn.Parameter, *, modified: bool = False):
        if self.zero_stage != 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modified else None)

    @property
    def module(self) -> torch.nn.Module:
        """The model itself."""
        return self._engine.module

    @property
    def layout(self) -> str:
        """What a checkpoint's files depend on beside the number of ranks, in words."""
        optimizer = self.config.get("optimizer", {}).get("type", "AdamW")
        return f"ZeRO {self.zero_stage}, {self.precision}, {optimizer}"

    @property
    def loss_scale(self) -> float:
        """The factor on all gradients before the optimizer unscales them; 1 but for fp16."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0)) if self.precision == "fp16" else 1.0

    def __call__(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass of one micro-batch; gradients add up as loss / accumulation."""
        self._engine.backward(loss)

    def step(self) -> bool:
        """Ends a micro-batch; at the accumulation boundary updates the weights. Returns whether it did.

        Weights are left alone, and False is returned, where the gradient is not finite.
        """
        if self._clip is not None and self._engine.is_gradient_accumulation_boundary():
            # A bound of infinity leaves the gradient as it is.
            bound = self._clip or math.inf
            self._norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), bound))
            if not math.isfinite(self._norm):
                return False
        self._engine.step()
        return bool(self._engine.was_step_applied())

    def set_learning_rate(self, rate: float) -> None:
        if not self._schedules_itself:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = rate

    def learning_rate(self) -> float:
        return float(self._engine.optimizer.param_groups[0]["lr"])

    def gradient_norm(self) -> float | None:
        """The global norm of the last step's gradients, before clipping; None where the engine does not tell."""
        norm = self._engine.get_global_grad_norm() if self._clip is None else self._norm
        return None if norm is None else float(norm)

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight whole on the CPU, one after the other; all ranks must go through it together.

        In fp32, or where weights were not trained just as they were stored.
        """
        for name, parameter in self.module.named_parameters():
            if self._frozen is not None:
                yield name, self._frozen[name]  # the engine's own copy may have been rounded to half precision
                continue
            master = self._deepspeed.utils.safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if master is not None:
                yield name, master.detach().float().cpu()
                continue
            with self._gathered(parameter):
                yield name, parameter.detach().float().cpu().clone()

    def model_config(self) -> dict[str, Any]:
        """The model's config.json, for a checkpoint to be complete."""
        return json.loads(self.module.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer states of all ranks into `folder/engine`; all ranks call it."""
        self._engine.save_checkpoint(str(folder), tag="engine")

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote with the same number of ranks."""
        path, _ = self._engine.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise UserError(f"{folder}: DeepSpeed could not load this checkpoint", remedy="start with --resume never")

    def close(self) -> None:
        """Frees the engine's hooks and buffers, for another stage in the same process."""
        self._engine.destroy()


def _buffers(model: torch.nn.Module, build: Callable[[], torch.nn.Module] | None) -> dict[str, torch.Tensor]:
    """The model's floating buffers, exact.

    Under half precision ZeRO-3 rounds them while they are made: the frequencies of rotary positions, for one, which in
    bf16 put distant tokens at wrong angles.

    Args:
        model: The model, not yet in the engine's hands.
        build: Makes another one, to copy from, if the model's own are rounded already.
    """
    named = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    if named and build is not None:
        named = {name: buffer for name, buffer in build().named_buffers() if name in named}
    return {name: buffer.detach().clone() for name, buffer in named.items()}


def _copy_into(parameter: torch.nn.Parameter, weights: Mapping[str, torch.Tensor], name: str) -> UserError | None:
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


def _freeze_all_but_smallest(model: torch.nn.Module) -> None:
    # The engine needs something to optimise: the smallest parameter stays in its hands with a learning rate of 0.
    smallest = min(model.parameters(), key=lambda p: getattr(p, "ds_numel", p.numel()))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is smallest)


def checkpoint_weights(folder: Path) -> Mapping[str, torch.Tensor]:
    """The fp32 weights in a checkpoint that `Engine.save` or DeepSpeed wrote, at any ZeRO stage.

    Args:
        folder: The folder that holds the tag's folder and `latest`. DeepSpeed unpickles what ZeRO 1 to 3 left there:
            it must come from someone trusted.

    Raises:
        UserError: not a whole checkpoint of DeepSpeed's.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    tag = "engine" if (folder / "engine").is_dir() else (folder / "latest").read_text().strip()
    shards = sorted((folder / tag).glob("*_optim_states.pt"))
    if not shards:
        return load_pt(folder / tag / "mp_rank_00_model_states.pt")["module"]
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag, lazy_mode=True)
    except Exception as error:  # whatever DeepSpeed stumbles over in a folder that is not its own, or not whole
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder / tag}: DeepSpeed cannot read this checkpoint", got=reason) from None
    # `contiguous` is what puts a weight together from the ranks' shards.
    return LazyTensors({name: partial(_whole, weights[name]) for name in weights})


def _whole(pieces: Any) -> torch.Tensor:
    return pieces.contiguous().detach()
