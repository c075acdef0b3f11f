"""The families that cook knows, and registration of further ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cook.base.errors import UserError
from cook.families import bert, cpm_ant, decoders
from cook.models import ragged
from cook.pruning.family import Adapter

OWN: tuple[Adapter, ...] = (cpm_ant.ADAPTER, *decoders.ADAPTERS, *bert.ADAPTERS)
_added: list[Adapter] = []


def adapters() -> tuple[Adapter, ...]:
    """All families; those registered last come first."""
    return (*reversed(_added), *OWN)


def register(adapter: Adapter) -> None:
    """Registers a family; it takes precedence over a built-in one with the same `model_type`."""
    _added.append(adapter)


def unregister(adapter: Adapter) -> None:
    """Removes a family that `register` added."""
    _added.remove(adapter)


def stock_type(config: Mapping[str, Any]) -> Any:
    """The stock model type of a config.json; a ragged export names the stock type that it derives from."""
    return config.get("stock_type" if config.get("model_type") == ragged.MODEL_TYPE else "model_type")


def knows(config: Mapping[str, Any]) -> bool:
    """Whether there is an adapter for a config.json."""
    return _find(config) is not None


def by_config(config: Mapping[str, Any]) -> Adapter:
    """The adapter of a model's config.json.

    Raises:
        UserError: there is none; the message lists the known families and what an adapter needs.
    """
    found = _find(config)
    if found is None:
        known = ", ".join(sorted(t for a in adapters() for t in a.model_types if t))
        raise UserError(
            f"no adapter for models of type {stock_type(config)!r}",
            wanted=known,
            remedy="for another family of transformers, fill in a cook.families.layout.Family (the names of its layer "
            "list, of the products of its attention and FFN blocks, of its norms, and of its config's sizes), and pass "
            "stock_adapter(family) to cook.families.registry.register before cook starts; documentation: Add a family",
        )
    return found


def _find(config: Mapping[str, Any]) -> Adapter | None:
    wanted = stock_type(config)
    if wanted is not None and not isinstance(wanted, str):
        return None
    return next((adapter for adapter in adapters() if wanted in adapter.model_types), None)
