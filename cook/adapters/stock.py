"""Adapters of families that stock transformers has, made from their tables.

All sizes are read from a model built on the meta device.
"""

from __future__ import annotations

from cook.adapters import stock_models, stock_shrink, stock_space
from cook.adapters.protocol import Adapter, Batch
from cook.adapters.tables import Family


def stock_adapter(family: Family) -> Adapter:
    """The adapter of a family."""
    return Adapter(
        family=family.family,
        model_types=family.model_types,
        space=lambda config, head_unit="kv_group": stock_space.space(family, config, head_unit),
        head_units=lambda config: stock_space.head_units(family, config),
        build=lambda config: stock_models.build(family, config),
        read=lambda config, tensors: stock_models.read(family, config, tensors),
        shrink=lambda config, space, kept: stock_shrink.shrink(family, config, space, kept),
        modeling=stock_models.modeling,
        inputs=packed_inputs,
    )


def packed_inputs(batch: Batch) -> dict:
    """A causal model's call: positions begin again with every sample, by which transformers keeps samples apart.

    It does so only where there is neither an attention mask nor a cache. Padding counts as samples of one token.
    """
    return {"input_ids": batch["input"], "position_ids": batch["position"], "use_cache": False}
