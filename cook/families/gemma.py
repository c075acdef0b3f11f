"""Gemma 2 and the text models of Gemma 3: norms before and after every block, sliding windows in some layers."""

from __future__ import annotations

from cook.families.layout import Attention, Family, FeedForward
from cook.families.stock import stock_adapter

ATTENTION = Attention(norms_after=("post_attention_layernorm",))
FFN = FeedForward(norms_before=("pre_feedforward_layernorm",), norms_after=("post_feedforward_layernorm",))
ADAPTERS = (
    stock_adapter(Family(family="Gemma 2", model_types=frozenset({"gemma2"}), attention=ATTENTION, ffn=FFN)),
    stock_adapter(Family(family="Gemma 3", model_types=frozenset({"gemma3_text"}), attention=ATTENTION, ffn=FFN)),
)
