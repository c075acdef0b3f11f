"""Stock models: building from a config, reading from folders, and the shapes of their weights.

A folder is read as transformers' `from_pretrained` reads it, with its tables of renamed keys, or refused.

A stock class has no layers without blocks, so reshaping (`stock.py`) removes such layers and renumbers the others.
The config stores the original numbers under `ORIGIN`, across any number of reshapings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
from cook.families.fused import with_fused_experts
from cook.families.layout import Family
from cook.models import cook_experts, ragged
from cook.pruning.family import Experts, ModelConfig, Modeling

MODULE = "modeling_cook_ragged"
ORIGIN = "origin_layers"  # key in `config.json`: the original number of each layer; absent if no number changed
TABLES = (r"(^|\.)rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")
"""Keys in files of older versions: buffers that the model computes itself."""
BIAS_FIELDS = ("attention_bias", "attention_out_bias", "mlp_bias", "use_bias", "bias")
"""Fields of configs that say whether projections have biases."""


def is_ragged(config: ModelConfig) -> bool:
    return config.get("model_type") == ragged.MODEL_TYPE


def architecture(config: ModelConfig) -> str:
    """The class that a config names; empty if it names none."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list | tuple) and named and isinstance(named[0], str) else ""


def config_object(config: ModelConfig) -> PreTrainedConfig:
    """The config as an object of transformers; raises a UserError if the config class refuses a value."""
    kind: Any = ragged.config_class(config["stock_type"]) if is_ragged(config) else CONFIG_MAPPING[config["model_type"]]
    made: PreTrainedConfig = stock_config(kind, config)
    return made


def check_sizes(family: Family, made: PreTrainedConfig) -> None:
    """Raises a UserError if a size is not an integer above 0, or the heads do not share keys evenly."""
    names, made = family.names, family.own_config(made)
    always = (names.layers, names.heads, names.hidden, "vocab_size")
    sizes: dict[str, Any] = {name: getattr(made, name, None) for name in always}
    # None: derived from the others, or not present.
    kv_name = names.kv_heads if isinstance(names.kv_heads, str) else ""
    for name in (kv_name, names.head_dim, names.ffn, "sliding_window"):
        if name and getattr(made, name, None) is not None:
            sizes[name] = getattr(made, name)
    if sizes.get("sliding_window") == 0 and getattr(made, "use_sliding_window", None) is False:
        del sizes["sliding_window"]  # Qwen2-MoE's config writes 0 for none
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            what = f"the model's config: {name} is not a valid size"
            raise UserError(what, wanted="an integer above 0", got=repr(value))
    if "sliding_attention" in (getattr(made, "layer_types", None) or ()) and "sliding_window" not in sizes:
        what = "it has layers with a sliding window but no sliding_window"
        raise UserError(f"the model's config contradicts itself: {what}")
    padding = getattr(made, "pad_token_id", None)
    if padding is not None and (not isinstance(padding, int) or padding < 0):
        raise UserError("the model's config: pad_token_id is not a valid id", wanted="an id or null", got=repr(padding))
    heads, kv_heads = sizes[names.heads], sizes.get(kv_name, 1)
    multiples = [(names.heads, heads, kv_name, kv_heads)]
    multiples += [(names.hidden, sizes[names.hidden], names.heads, heads)] if names.head_dim is None else []
    for name, number, divisor_name, divisor in multiples:
        if number % divisor:
            wanted = f"{name} that is a multiple of {divisor_name}"
            raise UserError("the model's config contradicts itself", wanted=wanted, got=f"{number} and {divisor}")


def build(family: Family, config: ModelConfig) -> torch.nn.Module:
    """A freshly initialised model on the current default device, in fp32."""
    made = config_object(config)
    check_sizes(family, made)
    kind: Any = ragged.model_class(made) if is_ragged(config) else getattr(transformers, family.auto_class)
    make = kind._from_config if is_ragged(config) else kind.from_config
    model: torch.nn.Module = make(made, dtype=torch.float32)
    return model


def skeleton(family: Family, config: ModelConfig) -> torch.nn.Module:
    """The same on the meta device: all shapes, no weights; raises a UserError if transformers cannot build it."""
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
    part = family.own_config(config)
    layers = part.get(family.names.layers) if isinstance(part, Mapping) else None
    if tensors and isinstance(layers, int) and layers > len(tensors):
        what = f"the weights do not fit the model's config: {layers} layers, and {len(tensors)} tensors"
        raise UserError(what, remedy=f"correct {family.names.layers} in config.json")
    native = plain(config_object(config))
    if not tensors:
        return native, tensors
    model: Any = skeleton(family, native)
    check_remembered(native, family.own_config(native)[family.names.layers])
    tensors = with_fused_experts(model, tensors)
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
    readers = {own: partial(tensors.__getitem__, chosen[own]) for own in shapes}
    return native, LazyTensors(readers, shapes, getattr(tensors, "parts", None))


def refuse_quantized(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises a UserError for quantized weights, which cannot be cut and whose scales belong to no unit."""
    settings = config.get("quantization_config") or config.get("compression_config")
    method = settings.get("quant_method", "unknown method") if isinstance(settings, Mapping) else settings
    ends = ("qweight", "qzeros", "absmax", "quant_map", "weight_scale", "weight_scale_inv", "weight_packed", "SCB")
    odd = next((name for name in tensors if name.endswith(tuple(f".{end}" for end in ends))), None)
    if settings or odd:
        raise UserError(
            "the model is quantized" + (f" ({method})" if settings else ""),
            wanted="plain weights of a floating-point type",
            got="quantization_config in config.json" if settings else f"the tensor {odd!r}",
            remedy="dequantize it first (transformers: model.dequantize(), then save_pretrained), or use the model "
            "that it was quantized from",
        )


def file_names(family: Family, config: ModelConfig) -> dict[str, str]:
    """The keys of weights in the family's files, as `save_pretrained` writes them, if they differ."""
    model: Any = skeleton(family, config)
    # A tied weight is stored as the embedding, which is not the first of its names where a class builds its head first.
    tables = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    embeddings = {own[0]: name for own, _ in _stored(model) for name in own[1:] if name in tables}
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(entry, WeightConverter) for entry in conversions):
        return embeddings  # transformers also reads the model's own keys
    renamings: list[Any] = [e.reverse_transform() for e in reversed(conversions) if not isinstance(e, PrefixChange)]
    names = {**weight_shapes(model), **dict(model.named_parameters(remove_duplicate=False))}  # tied ones too
    renamed = {name: apply_renamings(embeddings.get(name, name), renamings) for name in names}
    return {name: own for name, own in renamed.items() if own != name}


def _keys(family: Family, config: ModelConfig, model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The file's key of each model key; buffers and unused heads are skipped, other unknown keys refused."""
    state = model.state_dict()
    ignored = "|".join((*TABLES, *(model._keys_to_ignore_on_load_unexpected or ())))
    carried = "|".join(family.carried) or r"(?!)"
    own_key = _key_rule(model, state)
    keys: dict[str, str] = {}
    for name in tensors:
        own = own_key(name)
        if own in state:
            if own in keys:
                raise UserError(f"the weights contain {own!r} twice", got=f"{keys[own]!r} and {name!r}")
            keys[own] = name
        elif not re.search(ignored, own) and not re.search(carried, name):
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
    named, own = architecture(config), type(model).__name__
    what, wanted = f"the weights do not fit the model's config: {problem}", f"exactly the weights of {own}"
    if named in ("", own, ragged.RaggedModel.__name__) or not hasattr(transformers, named):
        return UserError(what, wanted=wanted)
    remedy = "load the folder with transformers as the class to be pruned, and save it with save_pretrained"
    return UserError(what, wanted=wanted, got=f"a {named}, by config.json", remedy=remedy)


def _all_equal(tensors: list[torch.Tensor]) -> bool:
    first, *others = tensors
    return all(o.dtype == first.dtype and o.shape == first.shape and torch.equal(o, first) for o in others)


def plain(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as the dictionary of its config.json, without temporary fields."""
    fields = {name: value for name, value in config.to_diff_dict().items() if name not in PASSING}
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            fields[name] = {key: value for key, value in part.to_dict().items() if key not in PASSING}
    return fields | {"model_type": type(config).model_type}


def modeling(config: ModelConfig) -> Modeling | None:
    """The modeling file of a ragged model."""
    if not is_ragged(config):
        return None
    auto_map = ragged.auto_map(config_object(config), MODULE)
    return Modeling(file=Path(ragged.__file__), auto_map=auto_map, imported=(Path(cook_experts.__file__),))


def experts(config: ModelConfig) -> Experts:
    """The FFN blocks of a model that are mixtures of experts."""
    found: Experts = config["structure"].get("experts", {}) if is_ragged(config) else {}
    return found


def with_experts(family: Family, config: ModelConfig, experts: Experts) -> dict[str, Any]:
    """The config of a ragged model with these experts, and otherwise of the same weights."""
    if is_ragged(config):
        return dict(config) | {"structure": config["structure"] | {"experts": dict(experts)}}
    structure: dict[str, Any] = {
        key: {} for key in ("shapes", "attributes", "absent", "constant", "spread", "gathered")
    }
    structure |= {"identity": [], "uneven_keys": False, "experts": dict(experts)}
    return ragged_config(family, config, structure)


def ragged_config(family: Family, stock: ModelConfig, structure: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the stock model of another config, changed as described by `structure`."""
    return dict(stock) | {
        "architectures": [ragged.RaggedModel.__name__],
        "model_type": ragged.MODEL_TYPE,
        "stock_type": stock["model_type"],
        "stock_class": family.auto_class,
        "structure": structure,
    }


def with_biases(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The config of the same class with a bias in every output projection for which it has a setting."""
    wider = dict(config)
    if is_ragged(config):  # its weights are listed one by one
        return wider
    for name in BIAS_FIELDS:
        if getattr(family.own_config(config_object(config)), name, None) is not False:
            continue
        changed = family.with_fields(wider, {name: True})
        before, after = (weight_shapes(skeleton(family, each)) for each in (wider, changed))
        added = set(after) - set(before)
        outputs = (f".{family.attention.out}.bias", f".{family.ffn.out}.bias")
        if all(path.endswith(".bias") for path in added) and any(path.endswith(outputs) for path in added):
            wider = changed
    return wider


def check_remembered(config: ModelConfig, num_layers: int) -> None:
    """Raises a UserError if the field does not have one number per layer."""
    origin = config.get(ORIGIN)
    if origin is None:
        return
    if not isinstance(origin, list) or not all(type(n) is int for n in origin) or len(set(origin)) != num_layers:
        raise UserError(
            f"the model's config: {ORIGIN} does not give the original number of each layer",
            wanted=f"{num_layers} different numbers",
            got=repr(origin)[:80],
        )


def remembered(config: ModelConfig, num_layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """The field for the config of a reshaped model; empty if its layers keep their numbers.

    `config` and `num_layers` are those before reshaping; `kept` are the layers that stay, by their numbers there.
    """
    before = config.get(ORIGIN) or list(range(num_layers))
    origin = [before[layer] for layer in kept]
    return {} if origin == list(range(len(origin))) and len(origin) == num_layers else {ORIGIN: origin}


def own_path(config: ModelConfig, path: str) -> str | None:
    """Converts a module's path from before any layer was removed to its current path; None if its layer was removed."""
    origin = config.get(ORIGIN)
    found = re.search(r"(?<![^.])\d+(?![^.])", path)  # the first number in a path is that of the layer
    if origin is None or found is None:
        return path
    layer = int(found[0])
    return f"{path[: found.start()]}{origin.index(layer)}{path[found.end() :]}" if layer in origin else None
