"""GPT-NeoX and Pythia: queries, keys and values fused per head; the blocks in parallel or in sequence."""

from __future__ import annotations

from cook.families.layout import Attention, ConfigNames, Family, FeedForward
from cook.families.stock import stock_adapter

ADAPTERS = (
    stock_adapter(
        Family(
            family="GPT-NeoX",
            model_types=frozenset({"gpt_neox"}),
            layers="gpt_neox.layers",
            attention=Attention(
                modules={"attention": "pair"},
                q="attention.query_key_value",
                k="attention.query_key_value",
                v="attention.query_key_value",
                interleaved=True,
                out="attention.dense",
                remembers={},
            ),
            ffn=FeedForward(ins=("mlp.dense_h_to_4h",), out="mlp.dense_4h_to_h"),
            names=ConfigNames(kv_heads=None, head_dim=None),
        )
    ),
)
