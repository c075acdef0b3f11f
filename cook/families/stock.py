"""Adapters of stock transformers families, made from their tables.

All sizes are read from a model built on the meta device.
"""

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
    return Adapter(
        family=family.family,
        model_types=family.model_types,
        space=lambda config, head_unit="kv_group": stock_space.space(variant(family, config), config, head_unit),
        head_units=lambda config: stock_space.head_units(variant(family, config), config),
        build=lambda config: stock_models.build(variant(family, config), config),
        read=lambda config, tensors: stock_models.read(variant(family, config), config, tensors),
        file_names=lambda config: stock_models.file_names(variant(family, config), config),
        shrink=lambda config, space, kept, renumber=True: stock_shrink.shrink(
            variant(family, config), config, space, kept, renumber
        ),
        stock_holds=lambda config, heads, kv_heads: stock_shrink.holds_heads(
            variant(family, config), config, heads, kv_heads
        ),
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
