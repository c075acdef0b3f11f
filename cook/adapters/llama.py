"""Llama, and what has its layers: SmolLM2, Mistral."""

from __future__ import annotations

from cook.adapters.stock import stock_adapter
from cook.adapters.tables import Family

ADAPTERS = (
    stock_adapter(Family(family="Llama, SmolLM2", model_types=frozenset({"llama"}))),
    stock_adapter(Family(family="Mistral", model_types=frozenset({"mistral"}))),
)
