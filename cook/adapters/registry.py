"""The families that cook knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cook.adapters import cpm_ant
from cook.adapters.protocol import Adapter
from cook.base.errors import UserError

ADAPTERS: tuple[Adapter, ...] = (cpm_ant.ADAPTER,)


def by_family(family: str) -> Adapter:
    """The adapter that a run's `model.type` names."""
    for adapter in ADAPTERS:
        if adapter.family == family:
            return adapter
    raise UserError(f"unknown model type {family!r}", wanted=", ".join(a.family for a in ADAPTERS))


def by_config(config: Mapping[str, Any]) -> Adapter:
    """The adapter of a model folder's config.json."""
    model_type = config.get("model_type")
    for adapter in ADAPTERS:
        if (model_type is None or isinstance(model_type, str)) and model_type in adapter.model_types:
            return adapter
    known = ", ".join(sorted(t for a in ADAPTERS for t in a.model_types if t))
    raise UserError(f"no adapter for models of type {model_type!r}", wanted=known)
