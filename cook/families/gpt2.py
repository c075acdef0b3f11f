"""GPT-2: one Conv1D for queries, keys and values, biases everywhere, learned positions."""

from __future__ import annotations

from dataclasses import replace

from cook.families.layout import Attention, ConfigNames, Family, FeedForward
from cook.families.stock import stock_adapter
from cook.pruning.family import ModelConfig

FAMILY = Family(
    family="GPT-2",
    model_types=frozenset({"gpt2"}),
    layers="transformer.h",
    attention=Attention(
        modules={"attn": "pair"},
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        out="attn.c_proj",
        norms_before=("ln_1",),
        remembers={"attn.num_heads": "heads", "attn.split_size": "width"},
    ),
    ffn=FeedForward(ins=("mlp.c_fc",), out="mlp.c_proj", norms_before=("ln_2",)),
    names=ConfigNames(layers="n_layer", heads="n_head", kv_heads=None, head_dim=None, hidden="n_embd", ffn="n_inner"),
)


def _variant(family: Family, config: ModelConfig) -> Family:
    # Scores may be divided by the layer number, which must then stay the same.
    return replace(family, empty_layer_is_identity=not config.get("scale_attn_by_inverse_layer_idx"))


ADAPTERS = (stock_adapter(FAMILY, _variant),)
