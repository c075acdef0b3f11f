"""Stock models from a config: built, read from folders, described by the shapes of their weights.

What a folder holds is taken as transformers' `from_pretrained` takes it, by its own tables of renamed keys, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)

from cook.base.errors import UserError, library_errors
from cook.base.tensor_files import LazyTensors, known_shape
from cook.config.stock import PASSING, stock_config
from cook.families.layout import Family
from cook.families.origin import check_remembered
from cook.models import ragged
from cook.pruning.family import ModelConfig, Modeling

MODULE = "modeling_cook_ragged"
TABLES = (r"(^|\.)rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")
"""Keys in files of older versions: tables that the model computes itself."""


def is_ragged(config: ModelConfig) -> bool:
    """Whether the model needs `cook.models.ragged`."""
    return config.get("model_type") == ragged.MODEL_TYPE


def architecture(config: ModelConfig) -> str:
    """The class that a config names; empty where it names none."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list | tuple) and named and isinstance(named[0], str) else ""


def config_object(config: ModelConfig) -> PreTrainedConfig:
    """The config as transformers has it.

    Raises:
        UserError: a value that the family's config class refuses.
    """
    kind: Any = ragged.config_class(config["stock_type"]) if is_ragged(config) else CONFIG_MAPPING[config["model_type"]]
    return stock_config(kind, config)


def check_sizes(family: Family, made: PreTrainedConfig) -> None:
    """Refuses sizes of which no model can be built, before anything is built.

    Raises:
        UserError: a size that is not a whole number above zero, or heads that do not share keys evenly.
    """
    names = family.names
    always = (names.layers, names.heads, names.hidden, "vocab_size")
    sizes: dict[str, Any] = {name: getattr(made, name, None) for name in always}
    # None: follows from the others, or there is none.
    for name in (names.kv_heads, names.head_dim, names.ffn, "sliding_window"):
        if name and getattr(made, name, None) is not None:
            sizes[name] = getattr(made, name)
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"the model's config: {name} is no size", wanted="a whole number above 0", got=repr(value))
    if "sliding_attention" in (getattr(made, "layer_types", None) or ()) and "sliding_window" not in sizes:
        raise UserError("the model's config contradicts itself: layers with a sliding window, and no sliding_window")
    padding = getattr(made, "pad_token_id", None)
    if padding is not None and (not isinstance(padding, int) or padding < 0):
        raise UserError("the model's config: pad_token_id is no id", wanted="an id or null", got=repr(padding))
    heads, kv_heads = sizes[names.heads], sizes.get(names.kv_heads or "", 1)
    if heads % kv_heads:
        raise UserError(
            "the model's config contradicts itself",
            wanted=f"{names.heads} that is a multiple of {names.kv_heads}",
            got=f"{heads} and {kv_heads}",
        )
    if names.head_dim is None and sizes[names.hidden] % heads:
        raise UserError(
            "the model's config contradicts itself",
            wanted=f"{names.hidden} that is a multiple of {names.heads}",
            got=f"{sizes[names.hidden]} and {heads}",
        )


def build(family: Family, config: ModelConfig) -> torch.nn.Module:
    """A freshly initialised model on the current default device, in fp32."""
    made = config_object(config)
    check_sizes(family, made)
    if is_ragged(config):
        return ragged.model_class(made)._from_config(made, dtype=torch.float32)
    return getattr(transformers, family.auto_class).from_config(made, dtype=torch.float32)


def skeleton(family: Family, config: ModelConfig) -> torch.nn.Module:
    """The same on the meta device: all shapes, no weights.

    Raises:
        UserError: transformers cannot build a model of this config.
    """
    with torch.device("meta"), library_errors("transformers builds no model of this config"):
        return build(family, config)


def weight_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by key, persistent buffers among them; of tied weights the first alone."""
    return {names[0]: tuple(tensor.shape) for names, tensor in _stored(model)}


def _stored(model: torch.nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """All that a file of the model holds: each tensor with its keys, several where weights are tied."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def read(
    family: Family, config: ModelConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]]:
    """A folder's config, every field given, and its tensors under the keys of the model class.

    Tied weights that a file holds twice are one where they are equal; else the model is untied, as transformers does.

    Raises:
        UserError: the tensors are not those of the config's model, or are quantized.
    """
    refuse_quantized(config, tensors)
    layers = config.get(family.names.layers)
    if tensors and isinstance(layers, int) and layers > len(tensors):
        what = f"the weights do not fit the model's config: {layers} layers, and {len(tensors)} tensors"
        raise UserError(what, remedy=f"correct {family.names.layers} in config.json")
    native = plain(config_object(config))
    if not tensors:
        return native, tensors
    model: Any = skeleton(family, native)
    check_remembered(native, native[family.names.layers])
    keys = _keys(family, config, model, tensors)
    groups = [names for names, _ in _stored(model)]
    given = {names[0]: [keys[name] for name in names if name in keys] for names in groups}
    is_untied = not all(_all_equal([tensors[name] for name in files]) for files in given.values() if len(files) > 1)
    if is_untied:
        native |= {"tie_word_embeddings": False}
        model = skeleton(family, native)
    chosen = {own: keys.get(own, given[names[0]][0]) for names in groups for own in names if given[names[0]]}
    shapes = weight_shapes(model)
    for own, shape in shapes.items():
        if own not in chosen:
            raise _misfit(config, model, f"{own!r} is missing")
        found = known_shape(tensors, chosen[own])
        if found is not None and found != shape:
            raise UserError(
                "the weights do not fit the model's config",
                wanted=f"{own!r} of shape {shape}",
                got=f"shape {found}",
                remedy="take config.json and weights of one model",
            )
    return native, LazyTensors({own: partial(tensors.__getitem__, chosen[own]) for own in shapes}, shapes)


def refuse_quantized(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Quantized weights cannot be cut, and their scales belong to no unit.

    Raises:
        UserError: the config or the tensors' names say that the weights are quantized.
    """
    said = config.get("quantization_config") or config.get("compression_config")
    method = said.get("quant_method", "unknown method") if isinstance(said, Mapping) else said
    ends = ("qweight", "qzeros", "absmax", "quant_map", "weight_scale", "weight_scale_inv", "weight_packed", "SCB")
    odd = next((name for name in tensors if name.endswith(tuple(f".{end}" for end in ends))), None)
    if said or odd:
        raise UserError(
            "the model is quantized" + (f" ({method})" if said else ""),
            wanted="plain weights of a floating-point type",
            got="quantization_config in config.json" if said else f"the tensor {odd!r}",
            remedy="dequantize it first (transformers: model.dequantize(), then save_pretrained), or take the model "
            "that it was quantized from",
        )


def _is_carried(family: Family, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in family.carried)


def file_names(family: Family, config: ModelConfig) -> dict[str, str]:
    """The keys under which files of the family hold weights, as `save_pretrained` writes them, where they differ."""
    model: Any = skeleton(family, config)
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(entry, WeightConverter) for entry in conversions):
        return {}  # transformers also reads the model's own keys
    renamings: list[Any] = [e.reverse_transform() for e in reversed(conversions) if not isinstance(e, PrefixChange)]
    return {name: renamed for name in weight_shapes(model) if (renamed := apply_renamings(name, renamings)) != name}


def _keys(family: Family, config: ModelConfig, model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For the model's keys the file's; tables and carried weights are passed over, all else that is strange refused."""
    state = model.state_dict()
    ignored = (*TABLES, *(model._keys_to_ignore_on_load_unexpected or ()))
    own_key = _key_rule(model, state)
    keys: dict[str, str] = {}
    for name in tensors:
        own = own_key(name)
        if own in state:
            if own in keys:
                raise UserError(f"the weights hold {own!r} twice", got=f"{keys[own]!r} and {name!r}")
            keys[own] = name
        elif not any(re.search(pattern, own) for pattern in ignored) and not _is_carried(family, name):
            raise _misfit(config, model, f"{name!r} has no place in the model")
    return keys


def _key_rule(model: Any, state: dict[str, torch.Tensor]) -> Callable[[str], str]:
    """Gives the model's key for a tensor of a file, by transformers' rules."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]

    def own_key(name: str) -> str:
        own, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if own not in state and name in state:
            return name
        if converted is not None and own != name:
            raise UserError(
                f"the weights are in a layout that transformers converts when it loads them: {name!r}",
                remedy="load the model with transformers and save it with save_pretrained(folder, "
                "save_original_format=False)",
            )
        return own

    return own_key


def _misfit(config: ModelConfig, model: Any, problem: str) -> UserError:
    named = architecture(config)
    own = type(model).__name__
    is_other = named not in ("", own, ragged.RaggedModel.__name__) and hasattr(transformers, named)
    return UserError(
        f"the weights do not fit the model's config: {problem}",
        wanted=f"all weights of {own} and no others",
        got=f"a {named}, by config.json" if is_other else None,
        remedy="load the folder with transformers as the class that is to be pruned, and save it with save_pretrained"
        if is_other
        else None,
    )


def _all_equal(tensors: list[torch.Tensor]) -> bool:
    first, *others = tensors
    return all(o.dtype == first.dtype and o.shape == first.shape and torch.equal(o, first) for o in others)


def plain(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as the dictionary that its config.json holds, without what passes."""
    fields = {name: value for name, value in config.to_diff_dict().items() if name not in PASSING}
    return fields | {"model_type": type(config).model_type}


def modeling(config: ModelConfig) -> Modeling | None:
    """The code beside a ragged model."""
    if not is_ragged(config):
        return None
    auto_map = {"AutoConfig": f"{MODULE}.{ragged.RaggedConfig.__name__}"}
    for factory in ragged.FACTORIES:
        name = factory.auto_class or config["stock_class"]
        if CONFIG_MAPPING[config["stock_type"]] in getattr(transformers, name)._model_mapping:
            auto_map.setdefault(name, f"{MODULE}.{factory.__name__}")
    return Modeling(file=Path(ragged.__file__), auto_map=auto_map)
