"""The original layer number of each layer of a reshaped model.

A stock class has no layers without blocks. So reshaping removes such layers and renumbers the others
(`stock_shrink`). The config stores the original numbers under `FIELD`, across any number of reshapings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cook.base.errors import UserError
from cook.pruning.family import ModelConfig

FIELD = "origin_layers"  # key in `config.json`: the original number of each layer; absent if no number changed


def check_remembered(config: ModelConfig, num_layers: int) -> None:
    """Checks that the field has one number per layer.

    Raises:
        UserError: the field is malformed.
    """
    origin = config.get(FIELD)
    if origin is None:
        return
    if not isinstance(origin, list) or not all(type(n) is int for n in origin) or len(set(origin)) != num_layers:
        raise UserError(
            f"the model's config: {FIELD} does not give the original number of each layer",
            wanted=f"{num_layers} different numbers",
            got=repr(origin)[:80],
        )


def remembered(config: ModelConfig, num_layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """The field for the config of a reshaped model; empty if its layers keep their numbers.

    Args:
        config: The config before reshaping.
        num_layers: Its number of layers.
        kept: The layers that stay, by their numbers in that model.
    """
    before = config.get(FIELD) or list(range(num_layers))
    origin = [before[layer] for layer in kept]
    return {} if origin == list(range(len(origin))) and len(origin) == num_layers else {FIELD: origin}


def own_path(config: ModelConfig, path: str) -> str | None:
    """Converts a module's path from before any layer was removed to its current path; None if its layer was removed.

    The first number in a path is that of the layer.
    """
    origin = config.get(FIELD)
    found = re.search(r"(?<![^.])\d+(?![^.])", path)
    if origin is None or found is None:
        return path
    layer = int(found[0])
    return f"{path[: found.start()]}{origin.index(layer)}{path[found.end() :]}" if layer in origin else None
