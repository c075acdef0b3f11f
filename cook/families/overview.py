"""The families and what works with them, as the table that the documentation shows."""

from __future__ import annotations

from cook.families.registry import adapters
from cook.pruning.family import Adapter
from cook.report.tables import markdown_table

HEADERS = (
    "family",
    "`model_type`",
    "attention units",
    "fewer heads",
    "fewer dims",
    "fewer layers",
    "missing blocks",
    "main job",
)


def families_table() -> str:
    """One row per family, in Markdown: which results are stock models, and whether the main command trains it."""
    return markdown_table(HEADERS, [_row(adapter) for adapter in adapters()])


def _row(adapter: Adapter) -> list[str]:
    can = adapter.abilities

    def result(is_stock: bool) -> str:
        return "own file" if not can.is_stock else "stock" if is_stock else "remote code"

    return [
        adapter.family,
        ", ".join(f"`{t}`" for t in sorted(t for t in adapter.model_types if t)),
        "key-value groups, query heads" if can.shares_keys else "heads",
        result(can.stock_heads) + (f", not with {can.stock_heads_except}" if can.stock_heads_except else ""),
        result(True),
        result(can.stock_layers),
        result(False),
        "yes" if adapter.is_causal else "no: encoder",
    ]
