"""A config.json of stock transformers as its config object, whatever the file says."""

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
    # How and where a model runs. An attention implementation may be the name of a kernel to download and run.
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
"""Fields that say nothing about the model's weights."""
LARGEST = {"num_hidden_layers": 10_000, "n_layer": 10_000, "num_layers": 10_000, "num_labels": 1_000_000}
"""Numbers above which not even a config or a model without weights is made: each is as many Python objects."""


def check_counts(config: Mapping[str, Any]) -> None:
    """Refuses numbers of layers and labels with which transformers would fill the memory.

    Raises:
        UserError: naming the field.
    """
    for name, largest in LARGEST.items():
        value = config.get(name)
        if isinstance(value, int) and value > largest:
            raise UserError(f"the model's config: {name} is too large", wanted=f"at most {largest:,}", got=value)


def stock_config(kind: Any, config: Mapping[str, Any]) -> Any:
    """The object of a config class.

    Args:
        kind: The class, of transformers or derived from one.
        config: What config.json holds; `PASSING` fields are left out.

    Raises:
        UserError: a value that the class refuses.
    """
    check_counts(config)
    with library_errors("the model's config is refused by transformers"):
        return kind(**{name: value for name, value in config.items() if name not in ("model_type", *PASSING)})
