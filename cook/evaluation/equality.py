"""The difference between two models' outputs, and the reference models that a reshaped model is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from cook.base.batches import Batch
from cook.base.errors import RunFailed
from cook.base.tensor_files import LazyTensors, read_model_config
from cook.data.token_loss import model_inputs
from cook.export.check import quiet, transformers_class
from cook.export.pruned_folder import mask_model
from cook.families.source import load_model, open_model
from cook.families.streamed import streamed_model
from cook.pruning.family import ModelSource, vocabulary_size
from cook.pruning.mask_set import Masks
from cook.pruning.reshape import kept_units, multiplied, reshaped
from cook.pruning.units import WIDE, PruningSpace

Answers = dict[str, torch.Tensor]
"""A model's outputs for one batch, by name: logits, span logits, or the hidden states of an encoder without a head."""


class _StaysInFp64(TorchDispatchMode):
    """fp64 is not narrowed to fp32, in which classes of transformers compute norms and softmaxes of any model."""

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), named: Any = None) -> Any:
        named = named or {}
        is_copy = function is torch.ops.aten._to_copy.default
        if is_copy and args[0].dtype == torch.float64 and named.get("dtype") == torch.float32:
            named = named | {"dtype": torch.float64}
        return function(*args, **named)


@torch.no_grad()
def answers(model: torch.nn.Module, batches: Iterable[Batch]) -> list[Answers]:
    """A model's outputs for all batches, in fp32; positions beyond a row's `length` are left out."""
    found: list[Answers] = []
    for batch in batches:
        out = model(**_call(model, model_inputs(batch)))
        named = out.items() if hasattr(out, "items") else vars(out).items()
        values = {name: value.float() for name, value in named if _is_answer(value)}
        if "length" in batch:
            length = next(iter(values.values())).shape[1]
            real = torch.arange(length)[None] < batch["length"][:, None]
            values = {name: value[real] for name, value in values.items()}
        found.append(values)
    return found


def answers_for(
    model: torch.nn.Module, batches: Sequence[Batch], kept: Sequence[int], size: int
) -> list[dict[str, torch.Tensor]]:
    """What the whole model answers where a model with the tokens `kept` gets `batches`: its logits for these tokens.

    Args:
        model: The whole model, of `size` tokens.
        batches: The inputs of the smaller one.
        kept: The old ids by new ones.
        size: Tokens of the whole model.
    """
    rows = torch.tensor(kept)
    old: list[Batch] = []
    for batch in batches:
        changed: Batch = {
            name: rows[batch[name].clamp(max=len(kept) - 1)] for name in ("input_ids", "input") if name in batch
        }
        if "segment" in batch:  # CPM-Ant's prompts are not tokens
            changed["input"] = torch.where(batch["segment"] == 0, batch["input"], changed["input"])
        old.append(batch | changed)
    return [
        {name: value[..., rows] if value.shape[-1] == size else value for name, value in answer.items()}
        for answer in answers(model, old)
    ]


def difference(first: Sequence[Answers], second: Sequence[Answers]) -> float:
    """max |a − b| / max |a| over all batches, for the output for which it is largest.

    Infinity if a number is not finite, or if all numbers of the first model are zero and those of the second are not.
    """
    assert any(value.numel() for answer in first for value in answer.values()), "nothing to compare the models on"
    names = {name for answer in (*first, *second) for name in answer}
    return max(_difference([(a[name], b[name]) for a, b in zip(first, second, strict=True)]) for name in names)


def largest_difference(first: torch.nn.Module, second: torch.nn.Module, batches: Iterable[Batch]) -> float:
    """`difference` of two models in memory."""
    batches = list(batches)
    return difference(answers(first, batches), answers(second, batches))


def _difference(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    apart = scale = 0.0
    for a, b in pairs:
        if not (a.isfinite().all() and b.isfinite().all()):
            return math.inf  # max() would ignore a NaN
        if a.numel():
            apart, scale = max(apart, float((a - b).abs().max())), max(scale, float(a.abs().max()))
    return apart / scale if scale else math.inf if apart else 0.0


def _is_answer(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _call(model: torch.nn.Module, inputs: Batch) -> Batch:
    if not any(made.__name__.endswith("ForMultipleChoice") for made in type(model).__mro__):
        return inputs
    # Its rows are the choices of one question, and it does not accept 2D attention masks.
    return {name: inputs[name][None] for name in ("input_ids", "position_ids") if name in inputs}


def together(batches: Iterable[Batch]) -> list[Batch]:
    """The same rows in fewer batches: those of equal shapes in one, for models whose weights every batch reads."""
    alike: dict[tuple[Any, ...], list[Batch]] = {}
    for batch in batches:
        shapes = {name: tuple(value.shape[1:]) if torch.is_tensor(value) else value for name, value in batch.items()}
        alike.setdefault(tuple(shapes.items()), []).append(batch)
    return [
        {
            name: torch.cat([b[name] for b in equal]) if torch.is_tensor(value) else value
            for name, value in first.items()
        }
        for equal in alike.values()
        for first in equal[:1]
    ]


def masked_model(
    source: ModelSource, space: PruningSpace, masks: Masks, dtype: torch.dtype, *, streamed: bool = False
) -> tuple[torch.nn.Module, str]:
    """Returns the whole model with its masked units set to zero, and a description of how it was loaded.

    transformers loads the folder with its own class where it has one; else cook reads and masks the model. Head and
    hidden dimensions, experts, and heads over which a norm averages cannot be masked by zeros in the weights alone.
    `streamed`: one layer is in memory at a time.
    """
    if streamed:
        model = _computing(streamed_model(source, dtype), dtype)
        mask_model(model, space, masks)
        return model, "the model as read and masked by cook, layer by layer"
    has_experts = bool(space.of("experts"))
    others = {g.name for g in space.every if g.norms or g.kind in WIDE or (has_experts and g.site == "ffn")}
    stays = all(bool(mask.all()) for name, mask in masks.items() if name in others)
    found = transformers_class(source.config) if (source.path / "config.json").is_file() else None
    if found is None or not stays:
        model = _computing(load_model(source, dtype), dtype)
        mask_model(model, space, masks)
        return model, "the model as read and masked by cook"
    model = _computing(_loaded(source.path, found[0], dtype), dtype)
    zero_units(model, space, masks)
    return model, f"{found[0].__name__} of transformers with the masked units set to zero"


def unrounded(source: ModelSource, space: PruningSpace, masks: Masks, tokens: Sequence[int] = ()) -> LazyTensors:
    """The weights in 16 bits that reshaping multiplied by a factor, before they were rounded again.

    In fp64, under the names in the reshaped model, each computed on access. If `tokens` are given, tables have these
    rows alone.
    """
    wide = {path for path in multiplied(space, masks) if source.tensors[path].element_size() < 4}
    if not wide:
        return LazyTensors({})
    readers = {name: partial(source.tensors.__getitem__, name) for name in source.tensors}
    readers |= {path: partial(lambda path: source.tensors[path].double(), path) for path in wide}
    small = reshaped(LazyTensors(readers), space, masks)
    renamed = source.adapter.shrink(source.config, space, kept_units(space, masks)).renamed

    def exact(path: str) -> torch.Tensor:
        is_table = tokens and space.shapes[path][0] == vocabulary_size(source.config)
        return small[path][torch.tensor(tokens)] if is_table else small[path]

    return LazyTensors({renamed.get(path, path): partial(exact, path) for path in wide if path in small})


def written_model(
    folder: Path, dtype: torch.dtype, *, streamed: bool = False, exact: Mapping[str, torch.Tensor] | None = None
) -> torch.nn.Module:
    """Loads a reshaped model as its users do.

    Args:
        folder: The model.
        dtype: The type of its weights in memory.
        streamed: As cook reads it, with one layer in memory at a time.
        exact: Weights to take in place of those in the files, which must be these rounded (`unrounded`); cook reads the
            model then.

    Raises:
        RunFailed: a weight in the files is not the rounded one.
    """
    if exact:
        source = open_model(folder)
        for name, tensor in exact.items():
            if not torch.equal(tensor.to(source.tensors[name].dtype), source.tensors[name]):
                raise RunFailed(f"{folder}: the weight {name!r} is not the one that the masks leave")
        readers = {
            name: partial((exact if name in exact else source.tensors).__getitem__, name) for name in source.tensors
        }
        source = replace(source, tensors=LazyTensors(readers))
        return _computing((streamed_model if streamed else load_model)(source, dtype), dtype)
    if streamed:
        return _computing(streamed_model(open_model(folder), dtype), dtype)
    found = transformers_class(read_model_config(folder))
    model = load_model(open_model(folder), dtype) if found is None else _loaded(folder, found[0], dtype)
    return _computing(model, dtype)


def _computing(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model, which computes in fp64 throughout if that is its type."""
    if dtype == torch.float64:
        model.forward = partial(_in_fp64, model.forward)
        # The products of experts that transformers chooses by default have no fp64.
        for module in model.modules():  # the setter of transformers leaves some families out, such as OLMoE
            if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
                config._experts_implementation = "eager"
    return model


def _in_fp64(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    with _StaysInFp64():
        return forward(*inputs, **named)


def _loaded(folder: Path, made: type, dtype: torch.dtype) -> torch.nn.Module:
    with quiet():
        # A config may name another attention implementation, which would be downloaded.
        model: torch.nn.Module = made.from_pretrained(  # type: ignore[attr-defined]
            folder,
            dtype=dtype,
            attn_implementation="sdpa" if made._supports_sdpa else "eager",  # type: ignore[attr-defined]
        )
    return model.eval()


@torch.no_grad()
def zero_units(model: torch.nn.Module, space: PruningSpace, masks: Masks) -> None:
    """Sets the output weights of masked units to zero; for a masked block the biases too."""
    weights = dict(model.named_parameters())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def weight(path: str) -> torch.Tensor:
        return next(weights[p] for p in (path, path.removeprefix(prefix), prefix + path) if p in weights)

    lasts = {
        (g.site, g.layer): g.slices[-1] for g in (*space.groups, *space.unprunable) if g.kind in ("heads", "dimff")
    }
    for group in space.groups:
        mask = masks.get(group.name)
        if mask is None or mask.all() or group.kind == "keys":  # without keys there are no query heads either
            continue
        last = lasts[group.site, group.layer]
        if group.kind == "layer":
            weight(last.path).zero_()
            for path in group.residue:
                if path.endswith(".bias"):
                    weight(path).zero_()
        else:
            kept = mask.repeat_interleave(last.block)
            shape = [-1 if dim == last.dim else 1 for dim in range(2)]
            weight(last.path).mul_(kept.view(shape))
