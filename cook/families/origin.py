"""Which layer of the model before pruning each layer of a reshaped one was.

A stock class holds no layer without blocks: when a model is reshaped such layers go, and the others are numbered anew
(`stock_shrink`). The config then remembers their first numbers under `FIELD`, over any number of reshapings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cook.base.errors import UserError
from cook.pruning.family import ModelConfig

FIELD = "origin_layers"
"""`config.json`: for each layer its number in the model that still had all of them; absent if it is the same."""


def check_remembered(config: ModelConfig, num_layers: int) -> None:
    """Refuses a field that is not one number for each layer.

    Raises:
        UserError: saying so.
    """
    origin = config.get(FIELD)
    if origin is None:
        return
    if not isinstance(origin, list) or not all(type(n) is int for n in origin) or len(set(origin)) != num_layers:
        raise UserError(
            f"the model's config: {FIELD} does not say which layer each layer was",
            wanted=f"{num_layers} different numbers",
            got=repr(origin)[:80],
        )


def remembered(config: ModelConfig, num_layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """The field for the config of a reshaped model; empty if its layers keep their numbers.

    Args:
        config: Of the model before.
        num_layers: Its layers.
        kept: Those that stay, by their numbers in it.
    """
    before = config.get(FIELD) or list(range(num_layers))
    origin = [before[layer] for layer in kept]
    return {} if origin == list(range(len(origin))) and len(origin) == num_layers else {FIELD: origin}


def own_path(config: ModelConfig, path: str) -> str | None:
    """A module's path in a model, from its path before any layer was removed; None if its layer is gone.

    The first number in a path is its layer's.
    """
    origin = config.get(FIELD)
    found = re.search(r"(?<![^.])\d+(?![^.])", path)
    if origin is None or found is None:
        return path
    layer = int(found[0])
    return f"{path[: found.start()]}{origin.index(layer)}{path[found.end() :]}" if layer in origin else None
