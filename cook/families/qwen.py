"""Qwen2 and Qwen3: Llama's layers, with biases on queries, keys and values, or with norms of queries and keys."""

from __future__ import annotations

from cook.families.layout import ConfigNames, Family
from cook.families.stock import stock_adapter

NAMES = ConfigNames(first_layers=("max_window_layers",))
ADAPTERS = (
    stock_adapter(Family(family="Qwen2", model_types=frozenset({"qwen2"}), names=NAMES)),
    stock_adapter(Family(family="Qwen3", model_types=frozenset({"qwen3"}), names=NAMES)),
)
