"""Phi-3: queries, keys and values in one weight, gate and up in another."""

from __future__ import annotations

from cook.families.layout import Attention, Family, FeedForward
from cook.families.stock import stock_adapter

ATTENTION = Attention(
    q="self_attn.qkv_proj",
    k="self_attn.qkv_proj",
    v="self_attn.qkv_proj",
    remembers={
        "self_attn.num_key_value_groups": "heads_per_kv",
        "self_attn.num_key_value_heads": "kv_heads",
        "self_attn.config.num_attention_heads": "heads",
    },
)
FFN = FeedForward(ins=("mlp.gate_up_proj", "mlp.gate_up_proj"))
# Phi3Config wants as many factors of longrope as follow from the hidden size divided by the heads.
ADAPTERS = (
    stock_adapter(
        Family(
            family="Phi-3",
            model_types=frozenset({"phi3"}),
            attention=ATTENTION,
            ffn=FFN,
            stock_heads_except="longrope",
        )
    ),
)
