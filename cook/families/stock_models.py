"""Stock models from a config: built, read from folders, described by the shapes of their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from cook.base.errors import UserError
from cook.base.tensor_files import LazyTensors
from cook.families.layout import Family
from cook.models import ragged
from cook.pruning.family import ModelConfig, Modeling

MODULE = "modeling_cook_ragged"
PASSING = ("transformers_version", "_name_or_path", "auto_map", "dtype", "torch_dtype", "quantization_config")
"""Fields of a config.json that say nothing about the model's shape."""


def is_ragged(config: ModelConfig) -> bool:
    """Whether the model needs `cook.models.ragged`."""
    return config.get("model_type") == ragged.MODEL_TYPE


def config_object(config: ModelConfig) -> PreTrainedConfig:
    """The config as transformers has it.

    Raises:
        UserError: a value that the family's config class refuses.
    """
    fields = {name: value for name, value in config.items() if name not in ("model_type", *PASSING)}
    try:
        if is_ragged(config):
            return ragged.config_class(config["stock_type"])(**fields)
        return CONFIG_MAPPING[config["model_type"]](**fields)
    except Exception as error:  # its own errors derive from several bases
        reason = str(error).strip().splitlines()[-1].strip() if str(error) else type(error).__name__
        raise UserError(f"the model's config is refused by transformers: {reason}") from None


def build(family: Family, config: ModelConfig) -> torch.nn.Module:
    """A freshly initialised model on the current default device, in fp32."""
    made = config_object(config)
    if is_ragged(config):
        return ragged.model_class(made)._from_config(made, dtype=torch.float32)
    return getattr(transformers, family.auto_class).from_config(made, dtype=torch.float32)


def skeleton(family: Family, config: ModelConfig) -> torch.nn.Module:
    """The same on the meta device: all shapes, no weights."""
    with torch.device("meta"):
        return build(family, config)


def weight_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by key; of tied weights the first alone, as safetensors files hold them."""
    return {path: tuple(weight.shape) for path, weight in model.named_parameters()}


def read(
    family: Family, config: ModelConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]]:
    """A folder's config, every field given, and its tensors under the keys of the model class."""
    native = plain(config_object(config))
    if not tensors:
        return native, tensors
    model: Any = skeleton(family, native)
    wanted, prefix = weight_shapes(model), model.base_model_prefix
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(wanted)
    buffers = {name for name, _ in model.named_buffers()}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unused = (r"\.rotary_emb\.inv_freq$", r"\.masked_bias$", *ignored, *family.unused)
    readers = {}
    for name in tensors:
        own = _own_name(name, prefix, wanted)
        # Older files hold tied weights twice, and tables that the model computes itself.
        if own in tied or own in buffers or (own not in wanted and any(re.search(p, own) for p in unused)):
            continue
        readers[own] = lambda name=name: tensors[name]
    return native, LazyTensors(readers)


def _own_name(name: str, prefix: str, wanted: Mapping[str, Any]) -> str:
    """The model's key for a tensor of a file: files of the bare model lack a prefix, older ones say gamma and beta."""
    spelled = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
    return next((key for key in (name, f"{prefix}.{name}", spelled, f"{prefix}.{spelled}") if key in wanted), name)


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
