"""The DeepSpeed engine: building it, and reading and writing its weights and checkpoints."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cook.base import distributed
from cook.base.batches import Batch, CallForm, as_it_is, on_device
from cook.base.device import collectives, device_of_rank
from cook.base.distributed import in_words, on_first_rank
from cook.base.errors import RunFailed, UserError
from cook.base.faults import point
from cook.base.modes import evaluating
from cook.base.rendezvous import Meeting, join, leave, meet
from cook.base.tensor_files import LazyTensors
from cook.config.types import TrainingConfig
from cook.training.deepspeed_checks import import_deepspeed, refusals
from cook.training.optim import MakeOptimizer, pretraining_adamw
from cook.training.settings import check_settings, resolve_precision
from cook.training.shards import TAG, Shards, ShardWriter
from cook.training.zero import (
    HeldZeros,
    NormWatch,
    Partitions,
    exact_buffers,
    fit_disk_buffers,
    freeze_all_but_smallest,
    read_from_disk_when_needed,
    reserve_state,
)


def initialise_processes(threads: int | None, meeting: Meeting | None = None) -> None:
    """Creates the process group (a single rank without a launcher) and sets the CPU threads of this rank.

    `threads` None divides the cores among the ranks of this machine. `meeting` is a rendezvous that has taken place.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_ranks))
    deepspeed = import_deepspeed()
    # DeepSpeed calls deprecated functions of torch, thousands of times.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    if device_of_rank(distributed.local_rank()).type == "cpu":
        # DeepSpeed's own CPU collectives would need a minute and a compiler first; gloo computes the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The other ranks wait in a collective while the first rank tokenises a corpus or hashes a checkpoint.
    backend, patience = collectives(), timedelta(hours=3)
    join(backend, meeting or meet(), patience)
    deepspeed.init_distributed(dist_backend=backend, timeout=patience, verbose=False)


def checkpoint_activations(model: Any) -> None:
    """Makes a model of transformers recompute its layers' activations in the backward pass."""
    # Newer versions of transformers have the first name, and warn of the second.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def leave_processes() -> None:
    """Destroys the process group; without this a rank that ends is aborted while its connections still work."""
    if distributed.is_on():
        # DeepSpeed also drops its own references to groups, so that a program can train twice.
        comm = import_deepspeed().comm
        (comm if comm.is_initialized() else torch.distributed).destroy_process_group()
    leave()


class Engine:
    """A model under DeepSpeed, with the calls that the step, the loop and the checkpoints need.

    Args:
        build: Builds the model, freshly initialised.
        weights: Initial tensors, read one at a time; None keeps the fresh ones.
        training: The stage's training section.
        deepspeed_config: The user's config, `auto` values included.
        make_optimizer: Creates the optimizer if the DeepSpeed config names none.
        call_form: Converts a batch to the model's arguments.
        on_host: Completes a batch before it is moved to the device.
    """

    def __init__(
        self,
        build: Callable[[], torch.nn.Module],
        weights: Mapping[str, torch.Tensor] | None,
        training: TrainingConfig,
        deepspeed_config: Mapping[str, Any],
        make_optimizer: MakeOptimizer = pretraining_adamw,
        call_form: CallForm = as_it_is,
        on_host: CallForm = as_it_is,
    ):
        deepspeed = import_deepspeed()
        self._deepspeed, self._call_form, self._on_host = deepspeed, call_form, on_host
        self.precision = resolve_precision(training, deepspeed_config)
        world = distributed.world_size()
        self.config = check_settings(training, deepspeed_config, world_size=world)
        self.zero_stage: int = self.config["zero_optimization"]["stage"]
        self.accumulation: int = self.config["gradient_accumulation_steps"]
        self.device = device_of_rank(distributed.local_rank())
        self._schedules_itself = "scheduler" in self.config
        self._clip: float | None = None
        self._zeros: HeldZeros | None = None
        self.stored_config: Mapping[str, Any] | None = None
        self.on_gradients: Callable[[], None] | None = None  # called before an update: `full_gradients` can be read
        if self.zero_stage == 0 and self.precision == "fp32":
            # At this stage DeepSpeed does not report the gradient's norm and applies gradients that are not finite.
            self._clip, self.config["gradient_clipping"] = self.config["gradient_clipping"], 0.0
        self._frozen = weights if weights is not None and not training.train_weights else None

        fit_disk_buffers(self.config["zero_optimization"], build, world)
        self._partitions = Partitions(deepspeed, self.zero_stage, self.device)
        model = self._partitioned(build) if self.zero_stage == 3 else build()
        buffers = exact_buffers(model, build if self.zero_stage == 3 else None)
        if weights is not None:
            self._partitions.load(model, weights)
        if training.activation_checkpointing:
            checkpoint_activations(model)
        if not training.train_weights:
            freeze_all_but_smallest(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = None if "optimizer" in self.config else make_optimizer(model, training)
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = [trained] if optimizer is None else [group["params"] for group in optimizer.param_groups]
        self._optimized = [names[parameter] for group in groups for parameter in group]
        with refusals(deepspeed_config):
            self._engine, self._optimizer, *_ = deepspeed.initialize(
                model=model, model_parameters=trained, optimizer=optimizer, config=self.config
            )
        read_from_disk_when_needed(self._engine.optimizer)
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.module.get_submodule(owner), leaf, buffer.to(self.device))
        if weights is not None and self.precision != "fp32":
            self._load_masters(weights)
        self._watch = NormWatch(self._engine.optimizer, self.zero_stage)
        self._writer = ShardWriter(_stored_classes())
        self._engine.checkpoint_engine = self._writer
        # DeepSpeed copies a script into every checkpoint; if that write failed, the ranks would diverge.
        self._engine._copy_recovery_script = lambda *_: None

    def _partitioned(self, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        with self._deepspeed.zero.Init(config_dict_or_path=self.config):
            return build()

    def _load_masters(self, weights: Mapping[str, torch.Tensor]) -> None:
        # The engine created its fp32 masters from parameters that were rounded to half precision.
        for name, parameter in self._trained():
            self._partitions.set_optimized(parameter, weights[name])

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    def described(self) -> str:
        """Precision, ZeRO stage, ranks and device, for messages."""
        return f"{self.precision}, ZeRO {self.zero_stage}, {distributed.world_size()} rank(s) on {self.device.type}"

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights in the forward pass."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def layout(self) -> dict[str, Any]:
        """The settings that a checkpoint's files depend on besides the world size."""
        optimizer = self.config.get("optimizer", {}).get("type", "AdamW")
        return {"zero_stage": self.zero_stage, "precision": self.precision, "optimizer": optimizer}

    @property
    def loss_scale(self) -> float:
        """The factor on all gradients before the optimizer unscales them; 1 except for fp16."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0)) if self.precision == "fp16" else 1.0

    @property
    def can_rescale(self) -> bool:
        """Whether an overflow may only mean that fp16's loss scale has to decrease further."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return self.precision == "fp16" and self.loss_scale > getattr(scaler, "min_scale", self.loss_scale)

    def moved(self, batch: Batch) -> Batch:
        """The batch on the engine's device."""
        return on_device(self._on_host(batch), self.device)

    def __call__(self, **inputs: Any) -> Any:
        return self._engine(**self._call_form(inputs))

    def ask(self, **inputs: Any) -> Any:
        """Runs a second forward pass between a forward and its backward pass, without gradients and dropout.

        It bypasses the hooks of the whole model, by which ZeRO-3 recognises a new step. So ZeRO-3 sees all three passes
        as one sequence, which it prefetches from the second time on.
        """
        with evaluating(self.module), torch.no_grad():
            return self.module.forward(**self._call_form(inputs))

    def attempt(
        self, loss_of: Callable[[Callable[..., Any]], torch.Tensor], leaves: Sequence[torch.Tensor] = ()
    ) -> None:
        """Runs a forward and a backward pass that changes nothing and does not communicate; not at ZeRO 3.

        It needs the memory of a step's: what a first step has yet to create is reserved meanwhile.

        Args:
            loss_of: Computes the loss of a micro-batch with the function of the model that it receives.
            leaves: Tensors besides the weights whose gradient is wanted.
        """
        assert self.zero_stage < 3, "at ZeRO 3 a pass needs all ranks"
        trained = [parameter for _, parameter in self._trained()]
        count = sum(parameter.numel() for parameter in trained)
        own = count // distributed.world_size() if self.zero_stage else count
        reserved = []
        if self.device.type != "cpu" and not self._engine.optimizer.state and not self._engine.zero_cpu_offload():
            reserved.append(torch.empty(2 * own, device=self.device))  # moments
        if self.accumulation > 1:
            carried = own if self.zero_stage == 2 else count
            reserved.append(torch.empty(carried, dtype=self.dtype, device=self.device))
        loss = loss_of(lambda **inputs: self.module(**self._call_form(inputs)))
        point("memory.trial")
        torch.autograd.grad(loss, [*trained, *leaves], allow_unused=True)
        del reserved

    def backward(self, loss: torch.Tensor) -> None:
        """Backward pass of one micro-batch; gradients add up as loss / accumulation."""
        self._engine.backward(loss)

    def step(self, limit: float = math.inf) -> bool:
        """Ends a micro-batch; updates the weights at the accumulation boundary. Returns whether it did.

        If the global norm of the gradient is not finite or above `limit`, which may be negative, the gradients are
        dropped, and weights, moments and the engine's scheduler do not change.
        """
        self._watch.begin(limit, self.loss_scale)
        if self.on_gradients is not None and limit >= 0 and self._engine.is_gradient_accumulation_boundary():
            self.on_gradients()
        if self._clip is not None and self._engine.is_gradient_accumulation_boundary():
            # A bound of infinity does not change the gradient.
            bound = self._clip or math.inf
            norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), bound))
            if not self._watch.accepts(norm):
                self._engine.zero_grad()
                self._engine.micro_steps += 1
                self._engine.skipped_steps += 1
                return False
        self._engine.step()
        if self._zeros and self._zeros.can_be_left:
            self._zeros.restore()
        return bool(self._engine.was_step_applied())

    def set_learning_rate(self, rate: float) -> None:
        if not self._schedules_itself:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = rate

    def learning_rate(self) -> float:
        return float(self._engine.optimizer.param_groups[0]["lr"])

    def gradient_norm(self) -> float | None:
        """The global norm of the last step's gradients, before clipping; None before the first step."""
        return self._watch.norm

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields every weight, whole and on the CPU; all ranks must iterate together.

        Weights are fp32; weights that were not trained keep their stored type.
        """
        for name, parameter in self.module.named_parameters():
            if self._frozen is not None:
                yield name, self._frozen[name]  # the engine's own copy may have been rounded to half precision
                continue
            yield name, self._partitions.whole(parameter)
        stored = self.module.state_dict().keys()
        yield from ((name, buffer.cpu()) for name, buffer in self.module.named_buffers() if name in stored)

    def full_gradients(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields gradients of whole parameters before clipping: of the whole batch, unscaled, rank averages, fp32.

        They exist between a step's last backward pass and its update (`on_gradients`); all ranks read them together.
        """
        parameters = dict(self.module.named_parameters())
        for name in names:
            gradient = self._deepspeed.utils.safe_get_full_grad(parameters[name])
            yield name, gradient.detach().float().cpu() / self.loss_scale

    def hold_zeros(self, masks: Mapping[str, torch.Tensor], *, gradients_only: bool = False) -> None:
        """Sets weights to 0 and keeps them at exactly 0, with any optimizer and across checkpoints.

        Args:
            masks: By parameter name; true (or 1) where a weight is kept.
            gradients_only: Only set their gradients to 0, and let weight decay and moments change them.
        """
        zeros = HeldZeros(dict(self.module.named_parameters()), masks, self._optimizer, self._partitions.gathered)
        if not gradients_only:
            zeros.restore()
            self._zeros = zeros

    def model_config(self) -> dict[str, Any]:
        """The config.json to store in a checkpoint: that of the model, unless `stored_config` is set."""
        if self.stored_config is not None:
            return dict(self.stored_config)
        return json.loads(self.module.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]

    def save(self, folder: Path) -> list[Path]:
        """Writes weights and optimizer states of all ranks into `folder/engine`; returns the files of this rank.

        Raises:
            RunFailed: this rank could not write; raised only after all ranks have finished.
        """
        self._writer.begin()
        order = {"optimized": self._optimized}
        self._engine.save_checkpoint(str(folder), tag=TAG, client_state=order, save_latest=False)
        if self._writer.failure:
            raise RunFailed(in_words(self._writer.failure)) from self._writer.failure
        return list(self._writer.written)

    def load(self, folder: Path) -> None:
        """Loads what `save` wrote with the same world size and the same `layout`."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise UserError(f"{folder}: DeepSpeed could not load this checkpoint", remedy="start with --resume never")

    def load_resharded(self, folder: Path) -> None:
        """Loads what `save` wrote with another world size or at another ZeRO stage; all ranks call it.

        Every rank reads the files of all ranks. fp32 masters, optimizer moments and counters are restored exactly.
        """
        shards = Shards(folder)
        if self._frozen is None:
            stored = shards.weights()  # tied weights under all their names, and buffers
            names = [name for name, _ in self.module.named_parameters() if name in stored]
            weights = LazyTensors({name: partial(stored.__getitem__, name) for name in names})
            self._partitions.load(self.module, weights)
            if self.zero_stage:
                self._load_masters(weights)
        optimizer, model = self._engine.optimizer, shards.model
        self.load_moments(shards.moments(self._optimized), shards.counters())
        for group, saved in zip(optimizer.param_groups, shards.groups(), strict=True):
            group |= {key: saved[key] for key in ("lr", "step") if key in saved}
        if self.precision == "fp16":
            vars(optimizer.loss_scaler).update(shards.loss_scale_state())
        if self._engine.lr_scheduler is not None:
            self._engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self._engine, counter, model[counter])

    def load_moments(self, moments: Mapping[str, Mapping[str, torch.Tensor]], counters: Mapping[str, Any]) -> None:
        """Sets the optimizer's tensors per weight and its counters; all ranks call it.

        Args:
            moments: Tensors in the shapes of the trained weights, by the optimizer's key and the weight's name.
            counters: The optimizer's step count, as it stores it.
        """
        optimizer, trained = self._engine.optimizer, self._trained()
        reserve_state(optimizer, self.zero_stage, [p for _, p in trained], counters, list(moments))
        for key, tensors in moments.items():
            for name, parameter in trained:
                if self.zero_stage:
                    self._partitions.set_optimized(parameter, tensors[name], key)
                else:
                    optimizer.state[parameter][key].copy_(tensors[name])

    def close(self) -> None:
        """Frees hooks and buffers, so that another stage can run in the same process."""
        self._engine.destroy()


def write_gathered(engine: Engine, write: Callable[[Iterator[tuple[str, torch.Tensor]]], None]) -> None:
    """Writes the full weights on the first rank; all ranks call it, and all raise the error if `write` fails."""
    weights = engine.full_weights()
    failure: Exception | None = None
    if distributed.rank() == 0:
        try:
            write(weights)
        except Exception as error:  # raised on all ranks below, by on_first_rank
            failure = error
    for _ in weights:  # every rank takes part in gathering each tensor, even if it cannot write
        pass

    def raise_failure() -> None:
        if failure is not None:
            raise failure

    on_first_rank(raise_failure)


def _stored_classes() -> tuple[Any, ...]:
    """DeepSpeed's classes in the order of `shards.CLASSES`."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address
