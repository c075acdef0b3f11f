"""Stock models: building from a config, reading from folders, and the shapes of their weights.

A folder is read as transformers' `from_pretrained` reads it, with its tables of renamed keys, or refused.
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
from cook.config.facts import PASSING, stock_config
from cook.families.layout import Family
from cook.families.origin import check_remembered
from cook.models import ragged
from cook.pruning.family import ModelConfig, Modeling

MODULE = "modeling_cook_ragged"
TABLES = (r"(^|\.)rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")
"""Keys in files of older versions: buffers that the model computes itself."""


def is_ragged(config: ModelConfig) -> bool:
    """Whether the model needs `cook.models.ragged`."""
    return config.get("model_type") == ragged.MODEL_TYPE


def architecture(config: ModelConfig) -> str:
    """The class that a config names; empty if it names none."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list | tuple) and named and isinstance(named[0], str) else ""


def config_object(config: ModelConfig) -> PreTrainedConfig:
    """The config as an object of transformers.

    Raises:
        UserError: the family's config class refuses a value.
    """
    kind: Any = ragged.config_class(config["stock_type"]) if is_ragged(config) else CONFIG_MAPPING[config["model_type"]]
    made: PreTrainedConfig = stock_config(kind, config)
    return made


def check_sizes(family: Family, made: PreTrainedConfig) -> None:
    """Checks the sizes before a model is built.

    Raises:
        UserError: a size is not an integer above 0, or the heads do not share keys evenly.
    """
    names = family.names
    always = (names.layers, names.heads, names.hidden, "vocab_size")
    sizes: dict[str, Any] = {name: getattr(made, name, None) for name in always}
    # None: derived from the others, or not present.
    for name in (names.kv_heads, names.head_dim, names.ffn, "sliding_window"):
        if name and getattr(made, name, None) is not None:
            sizes[name] = getattr(made, name)
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"the model's config: {name} is not a valid size", wanted="an integer above 0", got=repr(value)
            )
    if "sliding_attention" in (getattr(made, "layer_types", None) or ()) and "sliding_window" not in sizes:
        raise UserError(
            "the model's config contradicts itself: it has layers with a sliding window but no sliding_window"
        )
    padding = getattr(made, "pad_token_id", None)
    if padding is not None and (not isinstance(padding, int) or padding < 0):
        raise UserError("the model's config: pad_token_id is not a valid id", wanted="an id or null", got=repr(padding))
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
        model: torch.nn.Module = ragged.model_class(made)._from_config(made, dtype=torch.float32)
    else:
        model = getattr(transformers, family.auto_class).from_config(made, dtype=torch.float32)
    return model


def skeleton(family: Family, config: ModelConfig) -> torch.nn.Module:
    """The same on the meta device: all shapes, no weights.

    Raises:
        UserError: transformers cannot build a model of this config.
    """
    with torch.device("meta"), library_errors("transformers cannot build a model of this config"):
        return build(family, config)


def weight_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by key, including persistent buffers; tied weights appear once."""
    return {names[0]: tuple(tensor.shape) for names, tensor in _stored(model)}


def _stored(model: torch.nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """All tensors in a file of the model, each with its keys; tied weights have several."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def read(
    family: Family, config: ModelConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]]:
    """A folder's config with every field, and its tensors under the keys of the model class.

    If a file stores tied weights twice, equal copies are merged; else the model is untied, as transformers does.

    Raises:
        UserError: the tensors do not match the config's model, or are quantized.
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
                remedy="use config.json and weights of the same model",
            )
    return native, LazyTensors({own: partial(tensors.__getitem__, chosen[own]) for own in shapes}, shapes)


def refuse_quantized(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses quantized weights, which cannot be cut and whose scales belong to no unit.

    Raises:
        UserError: the config or the tensors' names show that the weights are quantized.
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
            remedy="dequantize it first (transformers: model.dequantize(), then save_pretrained), or use the model "
            "that it was quantized from",
        )


def _is_carried(family: Family, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in family.carried)


def file_names(family: Family, config: ModelConfig) -> dict[str, str]:
    """The keys of weights in the family's files, as `save_pretrained` writes them, if they differ."""
    model: Any = skeleton(family, config)
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(entry, WeightConverter) for entry in conversions):
        return {}  # transformers also reads the model's own keys
    renamings: list[Any] = [e.reverse_transform() for e in reversed(conversions) if not isinstance(e, PrefixChange)]
    names = {**weight_shapes(model), **dict(model.named_parameters(remove_duplicate=False))}  # tied ones too
    return {name: renamed for name in names if (renamed := apply_renamings(name, renamings)) != name}


def _keys(family: Family, config: ModelConfig, model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The file's key of each model key; buffers and unused heads are skipped, other unknown keys refused."""
    state = model.state_dict()
    ignored = (*TABLES, *(model._keys_to_ignore_on_load_unexpected or ()))
    own_key = _key_rule(model, state)
    keys: dict[str, str] = {}
    for name in tensors:
        own = own_key(name)
        if own in state:
            if own in keys:
                raise UserError(f"the weights contain {own!r} twice", got=f"{keys[own]!r} and {name!r}")
            keys[own] = name
        elif not any(re.search(pattern, own) for pattern in ignored) and not _is_carried(family, name):
            raise _misfit(config, model, f"{name!r} has no place in the model")
    return keys


def _key_rule(model: Any, state: dict[str, torch.Tensor]) -> Callable[[str], str]:
    """Returns a function from a file's key to the model's key, by transformers' rules."""
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
        wanted=f"exactly the weights of {own}",
        got=f"a {named}, by config.json" if is_other else None,
        remedy="load the folder with transformers as the class to be pruned, and save it with save_pretrained"
        if is_other
        else None,
    )


def _all_equal(tensors: list[torch.Tensor]) -> bool:
    first, *others = tensors
    return all(o.dtype == first.dtype and o.shape == first.shape and torch.equal(o, first) for o in others)


def plain(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as the dictionary of its config.json, without temporary fields."""
    fields = {name: value for name, value in config.to_diff_dict().items() if name not in PASSING}
    return fields | {"model_type": type(config).model_type}


def modeling(config: ModelConfig) -> Modeling | None:
    """The modeling file of a ragged model."""
    if not is_ragged(config):
        return None
    auto_map = {"AutoConfig": f"{MODULE}.{ragged.RaggedConfig.__name__}"}
    for factory in ragged.FACTORIES:
        name = factory.auto_class or config["stock_class"]
        if CONFIG_MAPPING[config["stock_type"]] in getattr(transformers, name)._model_mapping:
            auto_map.setdefault(name, f"{MODULE}.{factory.__name__}")
    return Modeling(file=Path(ragged.__file__), auto_map=auto_map)
