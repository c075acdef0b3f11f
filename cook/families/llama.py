"""Llama, and models with the same layers: SmolLM2, Mistral."""

from __future__ import annotations

from cook.families.layout import Family
from cook.families.stock import stock_adapter

ADAPTERS = (
    stock_adapter(Family(family="Llama, SmolLM2", model_types=frozenset({"llama"}))),
    stock_adapter(Family(family="Mistral", model_types=frozenset({"mistral"}))),
)
