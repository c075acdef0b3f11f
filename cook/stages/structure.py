"""The kept structure of a model as plain data, for `done.json`, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cook.masks.mask_set import Masks
from cook.space.units import PruningSpace


def describe_structure(space: PruningSpace, masks: Masks) -> dict[str, Any]:
    """For each layer the 0/1 masks of its heads (`att`) and dims (`ffn`); None for a block that is not there."""
    layers: list[dict[str, Any]] = [{"att": None, "ffn": None} for _ in range(space.num_layers)]
    for group in space.groups:
        if group.kind != "layer":
            block = masks.get(space.block(group).name)
            if block is None or bool(block.all()):
                mask = masks.get(group.name)
                units = [1] * group.size if mask is None else [int(z) for z in mask.tolist()]
                layers[group.layer][group.site] = units if any(units) else None
    return {"layers": layers}


def masks_of_structure(space: PruningSpace, structure: Mapping[str, Any]) -> dict[str, Any]:
    """The masks that `describe_structure` described."""
    import torch

    masks = {}
    for group in space.groups:
        units = structure["layers"][group.layer][group.site]
        if group.kind == "layer":
            masks[group.name] = torch.tensor([float(units is not None)])
        elif units is not None:
            masks[group.name] = torch.tensor(units, dtype=torch.float32)
    return masks


def sizes(structure: Mapping[str, Any], site: str) -> list[int]:
    """Units kept in each block that is still there, from the bottom up."""
    return [sum(layer[site]) for layer in structure["layers"] if layer[site] is not None]
