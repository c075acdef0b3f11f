"""What a configuration tells about its model before any weight is read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cook.base.errors import UserError
from cook.base.files import read_json
from cook.config.stock import stock_config
from cook.config.types import ModelConfig

STOCK_NAMES = {"num_heads": "num_attention_heads", "dim_ff": "intermediate_size"}
"""Fields that most Hugging Face classes name otherwise."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes of a model; None wherever its description does not say, or says it in an unexpected form."""

    vocab_size: int | None = None
    """Ids that the model knows."""

    prompt_length: int | None = None
    """Prompt embeddings in front of every row."""

    num_heads: int | None = None
    """Heads of every attention block, if they all have as many."""

    dim_ff: int | None = None
    """Dims of every FFN block, if they all have as many."""

    max_positions: int | None = None
    """Positions that a Hugging Face model was made for."""

    layers_removed: bool | None = None
    """Whether blocks are physically missing; None too where nobody asks for blocks to be removed first."""


def model_facts(model: ModelConfig) -> ModelFacts:
    """Facts from `model.config`, else from the config.json of the folder at `model.path`.

    Raises:
        UserError: The folder's config.json is there but cannot be read.
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
    positions = getattr(made, "max_position_embeddings", None)
    if "stock_type" in config:  # each layer has sizes of its own, which only an adapter can tell
        return ModelFacts(vocab_size=_integer(config, "vocab_size"), max_positions=positions)
    heads, dims, removed = (config.get(name) for name in ("layer_heads", "layer_dim_ff", "mask_modules"))
    return ModelFacts(
        vocab_size=_integer(config, "vocab_size"),
        prompt_length=_integer(config, "prompt_length"),
        num_heads=(_integer(config, "num_heads") or getattr(made, "num_attention_heads", None))
        if heads is None
        else _common(heads),
        dim_ff=_integer(config, "dim_ff") if dims is None else _common(dims),
        max_positions=positions,
        layers_removed=None if model.type == "hf" else _any_removed(removed),
    )


def _stock_object(config: Mapping[str, Any]) -> Any:
    """The config as its class in transformers has it, by the names that all classes share; None for a strange one."""
    from transformers import CONFIG_MAPPING

    kind = config.get("stock_type", config.get("model_type"))
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    with contextlib.suppress(UserError):  # opening the model says what is wrong
        return stock_config(CONFIG_MAPPING[kind], config)
    return None


def _integer(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name, config.get(STOCK_NAMES.get(name, name)))
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _common(per_layer: Any) -> int | None:
    """The size that all layers share; a layer of size 0 or without entries has no such block."""
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
