"""What a model's config.json says, read without the weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cook.base.errors import UserError, library_errors
from cook.base.files import read_json
from cook.config.types import ModelConfig

STOCK_NAMES = {"num_heads": "num_attention_heads", "dim_ff": "intermediate_size"}
"""Fields that have other names in most Hugging Face classes."""
EXPERT_DIMS = "moe_intermediate_size"
"""Dims of an expert, where `intermediate_size` is that of FFN blocks without experts. Only the family knows which
blocks have which."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes of a model. A size is None if the configuration lacks it or has it in an unexpected form."""

    vocab_size: int | None = None
    """Number of ids in the model's vocabulary."""
    prompt_length: int | None = None
    """Number of prompt embeddings in front of every row."""
    num_heads: int | None = None
    """Heads per attention block, if all blocks have the same number."""
    dim_ff: int | None = None
    """Dims per FFN block, if all blocks have the same number."""
    max_positions: int | None = None
    """Number of positions of a Hugging Face model."""
    layers_removed: bool | None = None
    """Whether blocks are physically missing. Also None for model types for which this does not matter."""


def model_facts(model: ModelConfig) -> ModelFacts:
    """Reads the sizes from `model.config`, or else from the config.json in the folder `model.path`.

    Raises UserError if that file exists but cannot be read.
    """
    config: Any = model.config
    if config is None and model.path is not None:
        file = os.path.join(model.path, "config.json")
        if not os.path.isfile(file):
            return ModelFacts()
        try:
            config = read_json(file)
        except ValueError as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        return ModelFacts()
    made = _stock_object(config) if model.type == "hf" else None
    positions, stock_heads = (getattr(made, key, None) for key in ("max_position_embeddings", "num_attention_heads"))
    if "stock_type" in config:  # the sizes differ per layer, and only the model family knows them
        return ModelFacts(vocab_size=_integer(config, "vocab_size"), max_positions=positions)
    heads, dims, removed = (config.get(name) for name in ("layer_heads", "layer_dim_ff", "mask_modules"))
    return ModelFacts(
        vocab_size=_integer(config, "vocab_size"),
        prompt_length=_integer(config, "prompt_length"),
        num_heads=_integer(config, "num_heads") or stock_heads if heads is None else _common(heads),
        dim_ff=_common(dims) if dims is not None else None if EXPERT_DIMS in config else _integer(config, "dim_ff"),
        max_positions=positions,
        layers_removed=None if model.type == "hf" else _any_removed(removed),
    )


def _stock_object(config: Mapping[str, Any]) -> Any:
    """The config as an object of its transformers class, which has common field names; None if this is impossible."""
    from transformers import CONFIG_MAPPING

    kind = config.get("stock_type", config.get("model_type"))
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    with contextlib.suppress(UserError):  # opening the model reports the error
        return stock_config(CONFIG_MAPPING[kind], config)
    return None


def _integer(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name, config.get(STOCK_NAMES.get(name, name)))
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _common(per_layer: Any) -> int | None:
    """The size that all layers share. Layers of size 0 or without entries have no such block and do not count."""
    if not isinstance(per_layer, list):
        return None
    sizes = {len(entry) if isinstance(entry, list) else entry for entry in per_layer if entry}
    size = sizes.pop() if len(sizes) == 1 else None
    return size if isinstance(size, int) else None


def _any_removed(mask_modules: Any) -> bool | None:
    if mask_modules is None:
        return False
    if not isinstance(mask_modules, list):
        return None
    return any(pair is True or isinstance(pair, list) and True in pair for pair in mask_modules)


PASSING = frozenset(
    "transformers_version _name_or_path auto_map dtype torch_dtype return_dict torchscript output_attentions "
    "output_hidden_states "
    # These select how and where a model runs. An attention implementation may name a kernel to download and run.
    "attn_implementation _attn_implementation _attn_implementation_internal fusion_config "
    "experts_implementation _experts_implementation _experts_implementation_internal distributed_config "
    "use_kernels".split()
)
"""Fields that do not affect the model's weights."""
LARGEST = {"num_hidden_layers": 10_000, "n_layer": 10_000, "num_layers": 10_000, "num_labels": 1_000_000}
"""Upper limits. Each of these counts is a number of Python objects, even for a config or a model without weights."""


def check_counts(config: Mapping[str, Any]) -> None:
    """Raises UserError for numbers of layers or labels with which transformers would exhaust the memory."""
    for name, largest in LARGEST.items():
        value = config.get(name)
        if isinstance(value, int) and value > largest:
            raise UserError(f"the model's config: {name} is too large", wanted=f"at most {largest:,}", got=value)


def stock_config(kind: Any, config: Mapping[str, Any]) -> Any:
    """Creates an object of a config class of transformers from a config.json, without its `PASSING` fields.

    Raises:
        UserError: the class refuses a value.
    """
    check_counts(config)
    with library_errors("transformers refuses the model's config"):
        return kind(**{name: value for name, value in config.items() if name not in ("model_type", *PASSING)})
