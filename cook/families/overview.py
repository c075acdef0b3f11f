"""The families and what works with them, as the table that the documentation shows."""

from __future__ import annotations

from typing import Any

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
    return markdown_table(HEADERS, [_row(facts) for facts in family_facts()])


def family_facts() -> list[dict[str, Any]]:
    """The same as JSON. Results are `stock`, `remote code` (a modeling file in the folder) or `own file`."""
    return [_facts(adapter) for adapter in adapters()]


def _facts(adapter: Adapter) -> dict[str, Any]:
    can = adapter.abilities

    def result(is_stock: bool) -> str:
        return "own file" if not can.is_stock else "stock" if is_stock else "remote code"

    return {
        "family": adapter.family,
        "model_types": sorted(model_type for model_type in adapter.model_types if model_type),
        "head_units": ["key-value groups", "query heads"] if can.shares_keys else ["heads"],
        "fewer_heads": result(can.stock_heads),
        "fewer_heads_except": can.stock_heads_except,
        "fewer_dims": result(True),
        "fewer_layers": result(can.stock_layers),
        "block_missing": result(False),
        "is_causal": adapter.is_causal,
    }


def _row(facts: dict[str, Any]) -> list[str]:
    exception = facts["fewer_heads_except"]
    return [
        facts["family"],
        ", ".join(f"`{model_type}`" for model_type in facts["model_types"]),
        ", ".join(facts["head_units"]),
        facts["fewer_heads"] + (f", not with {exception}" if exception else ""),
        facts["fewer_dims"],
        facts["fewer_layers"],
        facts["block_missing"],
        "yes" if facts["is_causal"] else "no: encoder",
    ]
