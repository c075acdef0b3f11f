"""Builds the config object of a stock transformers model from any config.json, safely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cook.base.errors import UserError, library_errors

PASSING = (
    "transformers_version",
    "_name_or_path",
    "auto_map",
    "dtype",
    "torch_dtype",
    # These select how and where a model runs. An attention implementation may name a kernel to download and run.
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "fusion_config",
    "distributed_config",
    "use_kernels",
    "return_dict",
    "torchscript",
    "output_attentions",
    "output_hidden_states",
)
"""Fields that do not affect the model's weights."""
LARGEST = {"num_hidden_layers": 10_000, "n_layer": 10_000, "num_layers": 10_000, "num_labels": 1_000_000}
"""Upper limits. Each of these counts is a number of Python objects, even for a config or a model without weights."""


def check_counts(config: Mapping[str, Any]) -> None:
    """Refuses numbers of layers and labels with which transformers would exhaust the memory.

    Raises:
        UserError: a number is too large. The message names the field.
    """
    for name, largest in LARGEST.items():
        value = config.get(name)
        if isinstance(value, int) and value > largest:
            raise UserError(f"the model's config: {name} is too large", wanted=f"at most {largest:,}", got=value)


def stock_config(kind: Any, config: Mapping[str, Any]) -> Any:
    """Creates an object of a config class.

    Args:
        kind: A config class of transformers, or one derived from it.
        config: The content of config.json. `PASSING` fields are ignored.

    Raises:
        UserError: the class refuses a value.
    """
    check_counts(config)
    with library_errors("transformers refuses the model's config"):
        return kind(**{name: value for name, value in config.items() if name not in ("model_type", *PASSING)})
