"""Checks of the model, the tokenizer, the batch sizes, the DeepSpeed settings and the distillation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from cook.base.errors import UserError
from cook.config.corpus import DataConfig
from cook.config.distillation import OWN_TEACHER, DistillationConfig
from cook.config.facts import ModelFacts
from cook.config.moefy import MoefyConfig
from cook.config.schema import shown
from cook.config.types import (
    CoarseConfig,
    FineConfig,
    JointConfig,
    ModelConfig,
    PruningConfig,
    StageEntry,
    TokenizerConfig,
    TrainingConfig,
    stage_of,
)

DEEPSPEED_TWINS = {
    ("train_batch_size",): "train_batch_size",
    ("train_micro_batch_size_per_gpu",): "micro_batch_size",
    ("gradient_clipping",): "clip",
    ("optimizer", "params", "lr"): "learning_rate",
    ("optimizer", "params", "weight_decay"): "weight_decay",
}
"""DeepSpeed's keys that have the same meaning as a key of `training`."""


def model_has_a_source(model: ModelConfig) -> Iterator[UserError]:
    """Checks that the model has a configuration or a folder. A `.pt` file contains only weights."""
    if model.type == "hf":
        if model.path is None or model.path.endswith((".pt", ".bin")):
            yield UserError("model.path: missing", wanted="the folder of a Hugging Face model", got=model.path)
        if model.config is not None:
            yield UserError("model.config: the folder of a Hugging Face model has its own config", wanted="null")
        return
    if model.config is None and model.path is None:
        yield UserError("model: neither config nor path is given", wanted="at least one of them")
    elif model.config is None and str(model.path).endswith((".pt", ".bin")):
        yield UserError("model.config: a .pt file does not describe its model", wanted="CPM-Live's keys or their JSON")
    config = model.config or {}
    pairs = config.get("mask_modules")
    if pairs is not None and len(pairs) != config["num_layers"]:
        wanted = f"{config['num_layers']} pairs, one per layer"
        yield UserError("model.config.mask_modules: wrong number of layers", wanted=wanted, got=len(pairs))


def tokenizer_fits(tokenizer: TokenizerConfig, model: ModelConfig, facts: ModelFacts) -> Iterator[UserError]:
    """Checks that every id of the tokenizer has a row in the embedding."""
    if model.type == "hf" and tokenizer.type == "sentencepiece" and tokenizer.path is None:
        what = "tokenizer.path: missing; a pretrained model needs its own tokenizer, not a newly trained one"
        yield UserError(what, wanted='the tokenizer of the model: type "hf" and its folder, or its sentencepiece file')
    if tokenizer.type != "sentencepiece" and tokenizer.path is None:
        wanted = "the folder of a Hugging Face tokenizer" if tokenizer.type == "hf" else "CPM-Ant's vocab.txt"
        yield UserError("tokenizer.path: missing", wanted=wanted)
    if facts.vocab_size is not None and tokenizer.vocab_size > facts.vocab_size:
        what, wanted = "tokenizer.vocab_size: larger than the model's vocabulary", f"at most {facts.vocab_size}"
        yield UserError(what, wanted=f"{wanted} (the model's vocab_size)", got=tokenizer.vocab_size)


def rows_hold_the_prompt(data: DataConfig, facts: ModelFacts) -> Iterator[UserError]:
    """Checks that a row has room for the prompt and at least one token, and that the model has enough positions."""
    length, positions, prompt = data.max_length, facts.max_positions, facts.prompt_length
    if positions is not None and length > positions:
        wanted = f"at most {positions} (the model's max_position_embeddings)"
        yield UserError("data.max_length: more than the model's number of positions", wanted=wanted, got=length)
    if prompt is not None and length <= prompt:
        wanted = f"more than {prompt} (the model's prompt_length)"
        yield UserError("data.max_length: the prompt leaves no room for text", wanted=wanted, got=length)


def batch_is_whole(
    training: TrainingConfig, stages: tuple[StageEntry, ...], world_size: int | None
) -> Iterator[UserError]:
    """Checks that train_batch_size = micro_batch_size × accumulation steps × ranks in every stage, in whole numbers."""
    for label, own in _trainings(training, stages, ("train_batch_size", "micro_batch_size")):
        rows = own.rows_at_once(world_size or 1)
        at_once = rows * (world_size or 1)
        if own.train_batch_size % at_once:
            ranks = f" × {world_size} ranks" if world_size else ""
            lower = own.train_batch_size // at_once * at_once
            choices = " or ".join(str(size) for size in (lower, lower + at_once) if size)
            yield UserError(
                f"{label}.train_batch_size: train_batch_size = micro_batch_size × accumulation steps × ranks "
                "does not give a whole number of accumulation steps",
                wanted=f"a multiple of micro_batch_size {rows}{ranks} = {at_once}",
                got=own.train_batch_size,
                remedy=f"set it to {choices}, or choose another micro_batch_size",
            )


def deepspeed_agrees(
    training: TrainingConfig, stages: tuple[StageEntry, ...], deepspeed: dict[str, Any], world_size: int | None
) -> Iterator[UserError]:
    """Checks that numbers that are in both `training` and the DeepSpeed configuration are equal."""
    for keys, field in DEEPSPEED_TWINS.items():
        value = _at(deepspeed, keys)
        if value is None or value == "auto":
            continue
        for label, own in _trainings(training, stages, (field,)):
            if isinstance(value, bool) or value != getattr(own, field):
                yield UserError(
                    f"deepspeed.{'.'.join(keys)}: differs from {label}.{field}",
                    wanted=" or ".join(dict.fromkeys(('"auto"', shown(getattr(own, field))))),
                    got=shown(value),
                )
    accumulation = deepspeed.get("gradient_accumulation_steps", "auto")
    if accumulation != "auto":
        yield from _accumulation(training, stages, accumulation, world_size)


def _accumulation(
    training: TrainingConfig, stages: tuple[StageEntry, ...], accumulation: Any, world_size: int | None
) -> Iterator[UserError]:
    key, got = "deepspeed.gradient_accumulation_steps", shown(accumulation)
    if not isinstance(accumulation, int) or isinstance(accumulation, bool) or accumulation < 1:
        yield UserError(f"{key}: not a number of steps", wanted='"auto" or an integer at least 1', got=got)
        return
    for label, own in _trainings(training, stages, ("train_batch_size", "micro_batch_size")):
        one_rank = own.rows_at_once(world_size or 1) * accumulation
        fits = own.train_batch_size == one_rank * world_size if world_size else own.train_batch_size % one_rank == 0
        if not fits or own.micro_batch_size == "auto":
            ranks = f"{world_size} rank(s)" if world_size else "ranks"
            yield UserError(
                f"{key}: train_batch_size = micro_batch_size × accumulation steps × ranks does not hold in {label}",
                wanted=f"{own.train_batch_size} = {own.micro_batch_size} × accumulation steps × {ranks}",
                got=got,
                remedy='write "auto"',
            )


def precision_agrees(
    training: TrainingConfig, stages: tuple[StageEntry, ...], deepspeed: dict[str, Any]
) -> Iterator[UserError]:
    """Checks that DeepSpeed's bf16 and fp16 switches, unless "auto", agree with `training.precision`."""
    switches = {name: _at(deepspeed, (name, "enabled")) for name in ("bf16", "fp16")}
    for name, value in switches.items():
        if value not in (None, "auto") and not isinstance(value, bool):
            what = f"deepspeed.{name}.enabled: not a switch"
            yield UserError(what, wanted='true, false or "auto"', got=shown(value))
    if switches["bf16"] is True and switches["fp16"] is True:
        yield UserError("deepspeed: bf16 and fp16 are both enabled", wanted="at most one of them")
    for label, own in _trainings(training, stages, ("precision",)):
        for name, value in switches.items():
            if isinstance(value, bool) and own.precision != "auto" and value != (own.precision == name):
                what = f"deepspeed.{name}.enabled: differs from {label}.precision {own.precision!r}"
                yield UserError(what, wanted=f'"auto" or {shown(own.precision == name)}', got=shown(value))


def checkpoints_can_be_trusted(deepspeed: dict[str, Any]) -> Iterator[UserError]:
    """Refuses DeepSpeed switches that would hide bad steps, split checkpoints or make a resume inexact."""
    for keys, bad, why in (
        (("zero_optimization", "compute_grad_norm"), False, "a non-finite gradient would be applied"),
        (("zero_optimization", "load_from_fp32_weights"), False, "a resumed run would start from rounded weights"),
        (("zero_optimization", "elastic_checkpoint"), True, "cook resumes on any number of ranks without it"),
        (("checkpoint", "use_node_local_storage"), True, "all ranks must see the whole checkpoint"),
    ):
        if _at(deepspeed, keys) is bad:
            yield UserError(f"deepspeed.{'.'.join(keys)}: {why}", wanted=shown(not bad), remedy="leave it out")


def _trainings(
    training: TrainingConfig, stages: tuple[StageEntry, ...], fields: tuple[str, ...]
) -> Iterator[tuple[str, TrainingConfig]]:
    """`training` itself, and the training section of every stage that changes one of `fields`."""
    yield "training", training
    for entry in stages:
        if any(field in entry.training for field in fields):
            yield f"stages.{entry.name}.training", dataclasses.replace(training, **entry.training)


def _at(tree: dict[str, Any], keys: tuple[str, ...]) -> Any:
    node: Any = tree
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def distillation_does_something(distillation: DistillationConfig | None) -> Iterator[UserError]:
    """Checks that at least one loss has a weight, and that each loss on states names its modules."""
    if distillation is None:
        return
    hidden, attention = distillation.mse_hidn_scale, distillation.mse_att_scale
    if not (distillation.ce_scale or hidden or attention):
        remedy = 'set "distillation" to null to train without a teacher'
        what = "distillation: ce_scale, mse_hidn_scale and mse_att_scale are all 0"
        yield UserError(what, wanted="at least one above 0", remedy=remedy)
    named = (("hidn", hidden, distillation.mse_hidn_module), ("att", attention, distillation.mse_att_module))
    for kind, scale, modules in named:
        if bool(scale) != bool(modules):
            yield UserError(
                f"distillation: mse_{kind}_scale and mse_{kind}_module must be given together",
                wanted="a scale above 0 with at least one module, or neither",
                got=f"scale {scale:g} with {len(modules)} module(s)",
            )
    if distillation.mse_hidn_proj and not hidden:
        yield UserError("distillation.mse_hidn_proj: no hidden states are compared", wanted="mse_hidn_scale above 0")


def teacher_can_teach(
    distillation: DistillationConfig | None,
    training: TrainingConfig,
    stages: tuple[StageEntry, ...],
    pruning: PruningConfig,
    coarse: CoarseConfig | None,
    fine: FineConfig | None,
    joint: JointConfig | None,
    moefy: MoefyConfig | None,
) -> Iterator[UserError]:
    """Checks that the recipe has the distillation's stages, and that weights stay fixed if the teacher is `self`."""
    if distillation is None:
        return
    trainings = {entry.name: dataclasses.replace(training, **entry.training) for entry in stages}
    for name in distillation.stages if stages else ():
        if name not in trainings:
            yield UserError(f"distillation.stages: {name} is not a stage of the recipe", wanted=", ".join(trainings))
    if distillation.teacher != OWN_TEACHER:
        return
    if distillation.teacher_device != "auto":
        what = 'distillation.teacher_device: "self" has no weights of its own'
        yield UserError(what, wanted="auto", got=distillation.teacher_device)
    if not stages and (described := stage_of(pruning, coarse, fine, joint, moefy=moefy)):
        trainings = {described: training}
    unfit = [
        f"{name} ({why})"
        for name, own in trainings.items()
        if name != "pretrain"
        and name in (distillation.stages or trainings)
        and (why := unfit_for_itself(name, own, joint))
    ]
    if unfit:
        yield own_teacher_moves(", ".join(unfit))


def unfit_for_itself(stage_name: str, training: TrainingConfig, joint: JointConfig | None) -> str | None:
    """Returns why a model cannot be its own teacher in a stage, or None if it can."""
    if joint and joint.sizes and stage_name.startswith("joint"):
        return None  # the largest model teaches the smaller ones
    if not stage_name.endswith("_mask"):
        return "it learns no mask"
    return "it trains weights" if training.train_weights else None


def own_teacher_moves(where: str) -> UserError:
    """Returns the error for a model that would be its own teacher while its weights are trained."""
    return UserError(
        'distillation.teacher: "self" is the dense model only while its weights stay fixed; in these stages the '
        "weights are trained, and the teacher would change with the student",
        wanted="mask stages with train_weights false, or joint stages of several sizes",
        got=where,
        remedy='list only mask stages in distillation.stages and set "train_weights": false in their training, or set '
        "distillation.teacher to the folder of a dense model",
    )
