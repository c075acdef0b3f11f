"""The kept structure of a model as plain data, for `done.json`, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cook.pruning.mask_set import Masks, consistent
from cook.pruning.units import WIDE, PruningSpace


def describe_structure(space: PruningSpace, masks: Masks) -> dict[str, Any]:
    """Heads (`att`) and FFN dimensions (`ffn`) of each layer as a string of 0 and 1; None for a missing block.

    A block of experts has the string `experts` too, and in `ffn` the dimensions of one expert after the other if they
    are masked. A block without masks of its dimensions is "1" where there are experts in the model. The strings
    `hidden` of the hidden dimensions and `head_dims` of the heads' are there if they are masked.
    """
    layers: list[dict[str, str | None]] = [{"att": None, "ffn": None} for _ in range(space.num_layers)]
    mixed = bool(space.of("experts"))
    for group in space.groups:
        if mixed and group.kind == "layer" and bool(masks.get(group.name, torch.ones(1)).all()):
            layers[group.layer][group.site] = "1"
        block = masks.get(space.block(group).name)
        if group.kind not in ("layer", "keys") and (block is None or bool(block.all())):
            mask = masks.get(group.name, torch.ones(1 if group.is_even and group.kind == "dimff" else group.size))
            units = "".join(str(int(z)) * group.members for z in mask.tolist())
            layers[group.layer]["experts" if group.kind == "experts" else group.site] = units if "1" in units else None
    members = {group.name: group.members for group in space.every}
    wide = {k: "".join(str(int(z)) * members[k] for z in masks[k].tolist()) for k in WIDE if k in masks}
    return {"layers": layers} | wide


def masks_of_structure(space: PruningSpace, structure: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The masks from the output of `describe_structure`."""
    masks = {}
    for group in space.groups:
        units = structure["layers"][group.layer].get("experts" if group.kind == "experts" else group.site)
        if group.kind == "layer":
            masks[group.name] = torch.tensor([float(units is not None)])
        elif group.kind != "keys" and units is not None and len(units) == group.size * group.members:
            masks[group.name] = torch.tensor([float(unit) for unit in units[:: group.members]])
    for group in space.every:
        if group.kind in WIDE and group.kind in structure:
            units = structure[group.kind][:: group.members]
            masks[group.kind] = torch.tensor([float(unit) for unit in units])
    return consistent(space, masks)


def as_lists(structure: Mapping[str, Any]) -> dict[str, Any]:
    """The same with lists of 0 and 1 instead of strings."""

    def units(text: str | None) -> list[int] | None:
        return None if text is None else [int(unit) for unit in text]

    return {"layers": [{site: units(text) for site, text in layer.items()} for layer in structure["layers"]]}


def sizes(structure: Mapping[str, Any], site: str) -> list[int]:
    """Units kept in each remaining block, from the first layer to the last."""
    return [layer[site].count("1") for layer in structure["layers"] if layer[site] is not None]
