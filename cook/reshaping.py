"""The Python API after masks are learned: the small dense model, and its comparison with the masked one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cook.api import Batch, Means, config_of, family_of
from cook.base.batches import on_device
from cook.base.errors import UserError
from cook.base.modes import evaluating
from cook.base.seeds import generator
from cook.evaluation.equality import largest_difference
from cook.export.pruned_folder import mask_model, reshaped_source
from cook.families.source import load_model, placed, with_biases
from cook.pruning.attach import gates_on
from cook.pruning.compensation import with_bias
from cook.pruning.family import ModelSource
from cook.pruning.mask_set import Masks, consistent
from cook.pruning.units import HeadUnit
from cook.recipe.summary import RESERVED


def reshape(model: torch.nn.Module, masks: Masks, *, means: Means | None = None) -> torch.nn.Module:
    """The small dense model that computes what `model` computes under `masks`.

    Args:
        model: A transformers model of a known family; it is left as it was.
        masks: 0 and 1 by group name.
        means: The means with which the masks were learned, if there were any: what removed units add on average becomes
            a bias.

    Returns:
        A model of the stock transformers class where that can hold the result, in eval mode, on the same device and in
        the same dtype. Save it with `save_pretrained`.

    Raises:
        UserError: the masks are of another model.
    """
    source, unit = _source(model, masks)
    space = source.adapter.space(source.config, unit)
    on_cpu = consistent(space, {name: mask.cpu() for name, mask in masks.items()})
    if own := _own(means, masks):
        source = with_biases(source)
        space = source.adapter.space(source.config, unit)
        source = replace(source, tensors=dict(with_bias(source.tensors.items(), space, on_cpu, own)))
    small = load_model(reshaped_source(source, space, on_cpu), None)
    for tensor in (*small.parameters(), *small.buffers()):
        tensor.data = tensor.data.clone()  # what is not cut would be shared with the whole model
    return placed(small, next(model.parameters()).device, None)


def verify(
    model: torch.nn.Module,
    masks: Masks,
    small: torch.nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    means: Means | None = None,
) -> float:
    """The largest difference of the logits of `model` under `masks` and of `small`, relative to the largest logit.

    In bf16 it is the rounding of the model's own sums, up to some 1e-2; `model.float()` shows the equality.

    Args:
        model: The model before pruning.
        masks: 0 and 1 by group name.
        small: What `reshape` returned.
        batches: Inputs of both, moved to their device; None: two rows of random ids.
        means: As for `reshape`.

    Raises:
        UserError: the masks are of another model, or there are no batches.
    """
    source, unit = _source(model, masks)
    space = source.adapter.space(source.config, unit)
    device = next(model.parameters()).device
    earlier = gates_on(model)  # as a callback leaves them after the training
    attached = mask_model(model, space, {name: mask.to(device) for name, mask in masks.items()})
    attached.compensate({name: mean.to(device) for name, mean in _own(means, masks).items()})
    try:
        given = _random_batches(model) if batches is None else batches
        inputs = [on_device(batch, device) for batch in given]
        if not inputs:
            raise UserError("there are no batches", wanted="batches to compare the logits on")
        with evaluating(model, small), ExitStack() as opened:
            for gates in earlier:
                opened.enter_context(gates.opened(fixed=True))
            return largest_difference(model, small, inputs)
    finally:
        attached.remove()


def _own(means: Means | None, masks: Masks) -> dict[str, torch.Tensor]:
    """The means of the groups that have masks; gates of other groups mix none in."""
    return {name: mean for name, mean in (means or {}).items() if name in masks}


def _source(model: torch.nn.Module, masks: Masks) -> tuple[ModelSource, HeadUnit]:
    """The live model as a source, and the kind of attention unit that these masks count."""
    adapter, _ = family_of(model)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config, native = adapter.read(config_of(model), tensors)
    source = ModelSource(adapter=adapter, config=config, tensors=native, path=Path("the model in memory"))
    for unit in adapter.head_units(config):
        space = adapter.space(config, unit)
        sizes = {group.name: group.size for group in space.every}
        if all(sizes.get(name) == len(mask) for name, mask in masks.items()):
            return source, unit
    raise UserError("the masks are of another model", remedy="give the model for which they were learned")


def _random_batches(model: torch.nn.Module) -> list[Batch]:
    whole: Any = model.config
    config = whole.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 128
    length = max(1, min(64, positions - RESERVED))
    ids = torch.randint(config.vocab_size, (2, length), generator=generator(0, "verify"))
    return [{"input_ids": ids.to(next(model.parameters()).device)}]
