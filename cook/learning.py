"""The Python API: masks of a transformers model learned, or found by a search, on the caller's own batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F

from cook.api import Batch, Means, attach, attach_nested, family_of
from cook.base.batches import on_device
from cook.base.errors import UserError
from cook.base.modes import evaluating
from cook.config.scheme import BlockUnit, HeadUnitChoice
from cook.distill.teacher_loss import token_divergence
from cook.pruning import search
from cook.pruning.attach import AttachedGates
from cook.pruning.budgets import Keep, check_keep
from cook.pruning.compensation import MeanInputs, compensable
from cook.pruning.live import LiveGates
from cook.pruning.mask_set import Masks

OnStep = Callable[[int, float, dict[str, float]], None]
Teacher = Literal["self"] | torch.nn.Module | None
TEACHER_WEIGHT, TEACHER_TEMPERATURE = 2.0, 2.0
"""Of the divergence from the teacher, beside the language-modelling loss; measured in `results/bench/quality.json`."""


def mean_inputs(model: torch.nn.Module, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """Averages the features that enter the output projections of attention and FFN blocks, over tokens.

    Give the result as `means` to `learn_masks` (or `attach`), and to `reshape` and `verify`: what removed heads and FFN
    dimensions add on average then stays as a bias, for which the small model pays nothing. A few hundred tokens are
    enough. Do not give means to `reshape` if the masks were learned without them: the result would be worse.

    Args:
        model: A causal transformers model of a known family.
        batches: As for `learn_masks`; all of them are read once.

    Returns:
        Means, float32 `[features]`, by the name of the group of units. A class that has no setting for a bias in one of
        the two projections, as Gemma in its FFN, has no means there.

    Raises:
        UserError: unknown family, a class without such biases, or no tokens.
    """
    _check_causal(model)
    adapter, config = family_of(model)
    config = adapter.with_biases(config)
    spaces = [adapter.space(config, unit) for unit in adapter.head_units(config)]
    groups = {group.name: group for space in spaces for group in compensable(space, space.groups)}
    if not groups:
        raise UserError(
            "means: the output projections need a bias",
            got=f"{type(model).__name__}, which has none here, and no setting for one",
            remedy="learn the masks without means",
        )
    device, tokens = next(model.parameters()).device, 0
    means = MeanInputs(model, tuple(groups.values()))
    try:
        with evaluating(model), torch.no_grad():
            for each in batches:
                batch = _inputs(each, device)
                predicts = F.pad(batch["labels"][:, 1:] != -100, (0, 1)).flatten().nonzero().flatten()
                tokens += len(predicts)
                means.at(predicts)
                model(**batch)
    finally:
        means.remove()
    if not tokens:
        raise UserError("there are no batches, or none of their tokens has a label", wanted="batches to average over")
    return means.means()


def learn_masks(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    keep: Keep,
    *,
    steps: int = 100,
    head_unit: HeadUnitChoice = "auto",
    teacher: Teacher = "self",
    seed: int = 0,
    context: int = 512,
    hidden: bool = False,
    round_to: int = 1,
    units: Collection[str] = (),
    means: Means | None = None,
    on_step: OnStep | None = None,
) -> dict[str, torch.Tensor]:
    """Learns which units to keep, with the weights frozen and the model in eval mode.

    Args:
        model: A causal transformers model of a known family. It is left as it was.
        batches: What the model is called with: `input_ids` `[batch, length]` and whatever else; without `labels`, all
            tokens that `attention_mask` covers are predicted. Read again from the start when they run out.
        keep: As for `plan`.
        steps: Batches to learn from.
        head_unit: As for `plan`.
        teacher: `"self"`: the model with all gates open, which keeps the masks from overfitting to the batches; another
            model with the same vocabulary; None: no teacher.
        seed: As for `attach`.
        context: As for `plan`.
        hidden: As for `plan`.
        round_to: As for `plan`.
        units: As for `plan`.
        means: As for `attach`.
        on_step: Called after each step with its number, the loss in nats per token, and the expected sparsity of each
            budget.

    Returns:
        Masks of 0 and 1, float32 `[units]`, by group name.

    Raises:
        UserError: as for `plan`; also if `batches` is empty, or the gradient of a gate is not finite.
    """
    _check_causal(model)
    _check_teacher(teacher)
    live = attach(
        model,
        keep,
        steps=steps,
        head_unit=head_unit,
        seed=seed,
        context=context,
        hidden=hidden,
        round_to=round_to,
        units=units,
        means=means,
    )
    [masks] = _learn(live, 1, batches, teacher, on_step)
    return masks


def learn_nested_masks(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    keep: Mapping[str, Sequence[float]],
    *,
    steps: int = 100,
    head_unit: HeadUnitChoice = "auto",
    teacher: Teacher = "self",
    seed: int = 0,
    context: int = 512,
    hidden: bool = False,
    round_to: int = 1,
    units: Collection[str] = (),
    means: Means | None = None,
    on_step: OnStep | None = None,
) -> dict[float, dict[str, torch.Tensor]]:
    """Learns masks of several sizes in one run: the units of each smaller model are a subset of the larger ones'.

    Every step trains one size, in random order, and moves the gates of all of them.

    Args:
        model: As for `learn_masks`.
        batches: As for `learn_masks`.
        keep: One name of `plan`'s `keep` with a value per size in descending order: `{"params": [0.8, 0.65, 0.5]}`.
        steps: Batches to learn from, for all sizes together.
        head_unit: As for `plan`.
        teacher: As for `learn_masks`.
        seed: As for `attach`.
        context: As for `plan`.
        hidden: As for `plan`.
        round_to: As for `plan`.
        units: As for `plan`.
        means: As for `attach`.
        on_step: As for `learn_masks`, with the budgets of all sizes.

    Returns:
        The masks of each size, by its value in `keep`.

    Raises:
        UserError: as for `learn_masks`; also if there are several names, or if values do not descend.
    """
    if len(keep) != 1:
        raise UserError("keep: several sizes share one name", wanted="one name", got=", ".join(keep) or "none")
    [(name, sizes)] = keep.items()
    if not sizes or any(after >= before for before, after in pairwise(sizes)):
        raise UserError(f"keep: {name}={list(sizes)}", wanted="values in descending order")
    keeps = [{name: size} for size in sizes]
    _check_causal(model)
    _check_teacher(teacher)
    live = attach_nested(
        model,
        keeps,
        steps=steps,
        head_unit=head_unit,
        seed=seed,
        context=context,
        hidden=hidden,
        round_to=round_to,
        units=units,
        means=means,
    )
    return dict(zip(sizes, _learn(live, len(sizes), batches, teacher, on_step), strict=True))


def _learn(
    live: LiveGates,
    sizes: int,
    batches: Iterable[Batch],
    teacher: Teacher,
    on_step: OnStep | None,
) -> list[dict[str, torch.Tensor]]:
    """Learns the masks of attached gates with the weights frozen, and removes the gates."""
    model = live.model
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    models = [each for each in (model, teacher) if isinstance(each, torch.nn.Module)]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with evaluating(*models):
            for _, batch in zip(range(live.gates.steps), _repeated(batches), strict=False):
                loss = _learn_from(live, batch, teacher)
                if on_step is not None:
                    on_step(live.step, loss, live.sparsity)
        return [live.masks(number) for number in range(sizes)]
    finally:
        live.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])


def _learn_from(live: LiveGates, batch: Batch, teacher: Teacher) -> float:
    """Moves the gates by the gradient of one batch; its loss in nats per token."""
    device = next(live.model.parameters()).device
    inputs = _inputs(batch, device)
    live.before_forward()
    output = live.model(**inputs)
    total = output.loss
    if teacher is not None:
        total = total + TEACHER_WEIGHT * _divergence(live, teacher, inputs, output.logits)
    total.backward()
    if not live.after_backward():
        raise UserError(
            f"step {live.step + 1}: the gradient of the gates is not finite",
            remedy="check the batches and the model for NaN or infinity, or use fp32 or bf16 instead of fp16",
        )
    return float(output.loss.detach())


def search_blocks(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    keep: float,
    *,
    unit: BlockUnit = "layer",
    teacher: Literal["self"] | None = "self",
    on_measure: Callable[[int, float], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Removes blocks one after the other, each time the one whose removal raises the loss on the batches least.

    Needs forward passes only. A few thousand tokens are enough.

    Args:
        model: A causal transformers model of a known family. It is left as it was.
        batches: As for `learn_masks`; all of them are read in every measurement.
        keep: The share of the parameters in attention and FFN blocks to keep.
        unit: What is removed at once: `"layer"`, so that a stock class holds the result, or `"block"`, an attention or
            FFN block.
        teacher: `"self"`: the divergence from the whole model is added to the loss, as in `learn_masks`. The whole
            model's logits for all batches are kept in memory.
        on_measure: Called after each measurement with its number and the loss in nats per token.

    Returns:
        Masks of 0 and 1, float32 `[1]`, by group name.

    Raises:
        UserError: unknown family, a share out of range, or no batches.
    """
    check_keep({"blocks": keep})
    _check_causal(model)
    _check_teacher(teacher)
    adapter, config = family_of(model)
    space = adapter.space(config)
    device = next(model.parameters()).device
    stored = [_inputs(batch, device) for batch in batches]
    if not stored:
        raise UserError("there are no batches", wanted="batches to measure the loss on")
    attached, measured = AttachedGates(model, space.of("layer"), {}), 0
    whole: list[torch.Tensor] = []

    def loss_of(number: int, batch: Batch) -> torch.Tensor:
        output, targets = model(**batch), batch["labels"][:, 1:]
        count = (targets != -100).sum()
        loss = output.loss * count
        if teacher is not None:
            if len(whole) == number:  # the first measurement is that of the whole model
                whole.append(output.logits)
            logits = (output.logits[:, :-1], whole[number][:, :-1])
            loss = loss + TEACHER_WEIGHT * token_divergence(*logits, targets, TEACHER_TEMPERATURE)
        return torch.stack([loss, count])

    def measure(masks: Masks) -> float:
        nonlocal measured
        attached.set({name: mask.to(device) for name, mask in masks.items()})
        total, count = sum(loss_of(number, batch) for number, batch in enumerate(stored)).tolist()  # type: ignore[union-attr]
        loss = float(total / count)
        measured += 1
        if on_measure is not None:
            on_measure(measured, loss)
        return loss

    try:
        with evaluating(model), torch.no_grad():
            return search.search_blocks(measure, space, space.of("layer"), 1.0 - keep, unit=unit)
    finally:
        attached.remove()


def _check_causal(model: torch.nn.Module) -> None:
    adapter, _ = family_of(model)
    if not adapter.is_causal:
        raise UserError(
            f"{type(model).__name__} does not predict the next token",
            wanted="a causal language model",
            remedy="train gates of an encoder in a loop of your own, with cook.attach",
        )


def _check_teacher(teacher: object) -> None:
    if not (teacher is None or teacher == "self" or isinstance(teacher, torch.nn.Module)):
        raise UserError("teacher", wanted='"self", a model in memory, or None', got=repr(teacher)[:80])


def _repeated(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        seen = False
        for batch in batches:
            seen = True
            yield batch
        if not seen:
            raise UserError("batches ran out", wanted="an iterable that can be read again, or one batch per step")


def _inputs(given: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch on the device, with labels."""
    if not isinstance(given, Mapping) or not isinstance(given.get("input_ids"), torch.Tensor):
        names = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise UserError("a batch", wanted='a mapping with a tensor "input_ids", [batch, length]', got=names)
    batch = on_device(given, device)
    if "labels" not in batch:
        labels = batch["input_ids"].clone()
        if "attention_mask" in batch:
            labels[batch["attention_mask"] == 0] = -100
        batch["labels"] = labels
    return batch


def _divergence(
    live: LiveGates, teacher: Literal["self"] | torch.nn.Module, batch: Batch, logits: torch.Tensor
) -> torch.Tensor:
    """Mean divergence from the teacher, per predicted token."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        if isinstance(teacher, torch.nn.Module):
            wanted = teacher(**inputs).logits
        else:
            with live.attached.opened(fixed=True):
                wanted = live.model(**inputs).logits
    targets = batch["labels"][:, 1:]
    summed = token_divergence(logits[:, :-1], wanted[:, :-1], targets, TEACHER_TEMPERATURE)
    return summed / (targets != -100).sum().clamp(min=1)
