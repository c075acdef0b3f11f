"""Adapters of stock transformers families, made from their tables; sizes are read from a model on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cook.base.batches import Batch
from cook.families import stock_models, stock_shrink, stock_space
from cook.families.layout import Family
from cook.pruning.family import Abilities, Adapter, ModelConfig


def stock_adapter(
    family: Family,
    variant: Callable[[Family, ModelConfig], Family] = lambda family, _config: family,
    inputs: Callable[[Batch], dict[str, Any]] | None = None,
    is_causal: bool = True,
) -> Adapter:
    """Makes the adapter of a family.

    Args:
        family: The family's table.
        variant: Adapts the table to a config, if config fields change names or norms.
        inputs: The model's arguments for a batch, if `packed_inputs` would mix samples.
        is_causal: Whether the model predicts the next token.
    """

    def of_config(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda config, *more, **named: function(variant(family, config), config, *more, **named)

    return Adapter(
        family=family.family,
        model_types=family.model_types,
        space=of_config(stock_space.space),
        head_units=of_config(stock_space.head_units),
        build=of_config(stock_models.build),
        read=of_config(stock_models.read),
        file_names=of_config(stock_models.file_names),
        shrink=of_config(stock_shrink.shrink),
        stock_holds=of_config(stock_shrink.holds_heads),
        modeling=stock_models.modeling,
        inputs=inputs or packed_inputs,
        abilities=Abilities(
            shares_keys=family.names.kv_heads is not None,
            stock_heads=family.names.head_dim is not None,
            stock_heads_except=family.stock_heads_except,
            stock_layers=family.empty_layer_is_identity,
        ),
        is_causal=is_causal,
    )


def packed_inputs(batch: Batch) -> Batch:
    """A causal model's arguments: positions restart with every sample, by which transformers separates samples.

    It does so only without an attention mask and without a cache. Padding counts as samples of one token.
    """
    return {"input_ids": batch["input"], "position_ids": batch["position"], "use_cache": False}


def masked_inputs(batch: Batch, *, causal: bool) -> dict[str, Any]:
    """The arguments of a class that does not separate samples by positions: a mask separates them."""
    sample_BL = (batch["position"] == 0).cumsum(1)
    mask_BQK = sample_BL[:, :, None] == sample_BL[:, None, :]
    mask_BQK = mask_BQK.tril() if causal else mask_BQK
    inputs = {"input_ids": batch["input"], "position_ids": batch["position"], "attention_mask": mask_BQK[:, None]}
    return inputs | ({"use_cache": False} if causal else {})
