"""OPT: learned positions, biases; norms before the blocks or, in the 350M model, after them on the residual stream."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cook.families.layout import Attention, ConfigNames, Family, FeedForward
from cook.families.stock import masked_inputs, stock_adapter
from cook.pruning.family import ModelConfig

FAMILY = Family(
    family="OPT",
    model_types=frozenset({"opt"}),
    layers="model.decoder.layers",
    attention=Attention(
        out="self_attn.out_proj",
        norms_before=("self_attn_layer_norm",),
        remembers={"self_attn.num_heads": "heads"},
    ),
    ffn=FeedForward(
        modules={"fc1": "value", "fc2": "value"}, ins=("fc1",), out="fc2", norms_before=("final_layer_norm",)
    ),
    names=ConfigNames(kv_heads=None, head_dim=None, ffn="ffn_dim"),
)


def _variant(family: Family, config: ModelConfig) -> Family:
    if config.get("do_layer_norm_before", True):
        return family
    return replace(
        family,
        attention=replace(family.attention, norms_before=()),
        ffn=replace(family.ffn, norms_before=()),
        empty_layer_is_identity=False,
    )


ADAPTERS = (stock_adapter(FAMILY, _variant, partial(masked_inputs, causal=True)),)
