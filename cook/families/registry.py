"""The families that cook knows, as records and as the table of the documentation; registration of further ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cook.base.errors import UserError
from cook.families import cpm_ant, decoder_tables, encoder_tables, tables
from cook.models import ragged
from cook.pruning.family import Adapter
from cook.report.tables import markdown_table

OWN: tuple[Adapter, ...] = (
    cpm_ant.ADAPTER,
    *tables.ADAPTERS,
    *decoder_tables.ADAPTERS,
    *encoder_tables.ADAPTERS,
)
_added: list[Adapter] = []
HEADERS = (
    "family",
    "`model_type`",
    "attention units",
    "fewer heads",
    "fewer experts",
    "fewer dims",
    "fewer head dims",
    "fewer hidden dims",
    "fewer layers",
    "missing blocks",
    "main job",
)


def adapters() -> tuple[Adapter, ...]:
    """All families; those registered last come first."""
    return (*reversed(_added), *OWN)


def register(adapter: Adapter) -> None:
    """Registers a family; it takes precedence over a built-in one with the same `model_type`."""
    _added.append(adapter)


def unregister(adapter: Adapter) -> None:
    _added.remove(adapter)


def stock_type(config: Mapping[str, Any]) -> Any:
    """The stock model type of a config.json; a ragged export names the stock type that it derives from."""
    return config.get("stock_type" if config.get("model_type") == ragged.MODEL_TYPE else "model_type")


def knows(config: Mapping[str, Any]) -> bool:
    return _find(config) is not None


def by_config(config: Mapping[str, Any]) -> Adapter:
    """The adapter of a model's config.json; raises a UserError if there is none."""
    found = _find(config)
    if found is None:
        known = ", ".join(sorted(t for a in adapters() for t in a.model_types if t))
        raise UserError(
            f"no adapter for models of type {stock_type(config)!r}",
            wanted=known,
            remedy="for another family of transformers, cook families guess MODEL prints a cook.families.layout.Family "
            "(names of layers, products, norms and sizes); correct it if need be, and pass stock_adapter(family) "
            "to cook.families.registry.register before cook starts; documentation: Add a family",
        )
    return found


def _find(config: Mapping[str, Any]) -> Adapter | None:
    wanted = stock_type(config)
    known = adapters() if wanted is None or isinstance(wanted, str) else ()  # other values may not be hashable
    return next((adapter for adapter in known if wanted in adapter.model_types), None)


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
        "fewer_experts": result(True) if can.experts else "none",
        "fewer_dims": result(can.stock_dims),
        # Phi-3's config refuses the factors that keep the frequencies of rotary positions.
        "fewer_head_dims": result(can.stock_heads and can.stock_heads_except != "longrope") if can.head_dims else "no",
        # As fewer heads, it needs a head size that the config names.
        "fewer_hidden_dims": result(can.stock_heads) if can.hidden else "no",
        "fewer_layers": result(can.stock_layers),
        "block_missing": result(False),
        "is_causal": adapter.is_causal,
        "main_job": adapter.is_causal and not adapter.mixes_samples({}),
    }


def _row(facts: dict[str, Any]) -> list[str]:
    exception = facts["fewer_heads_except"]
    return [
        facts["family"],
        ", ".join(f"`{model_type}`" for model_type in facts["model_types"]),
        ", ".join(facts["head_units"]),
        facts["fewer_heads"] + (f", not with {exception}" if exception else ""),
        facts["fewer_experts"],
        facts["fewer_dims"],
        facts["fewer_head_dims"],
        facts["fewer_hidden_dims"] + (f", not with {exception}" if exception else ""),
        facts["fewer_layers"],
        facts["block_missing"],
        "yes" if facts["main_job"] else "no: ALiBi" if facts["is_causal"] else "no: encoder",
    ]
