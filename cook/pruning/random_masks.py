"""Random masks of a given shape: the baseline that learned masks must beat."""

from __future__ import annotations

import torch

from cook.pruning.mask_set import Masks
from cook.pruning.units import PruningSpace


def random_masks_like(space: PruningSpace, masks: Masks, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random masks that keep as many attention blocks, FFN blocks, heads and FFN dimensions as `masks`.

    The kept blocks and the kept units inside them are drawn at random; the r-th kept block gets as many units as
    the r-th kept block of `masks`.
    """
    chosen: dict[str, torch.Tensor] = {}
    for site, kind in (("att", "heads"), ("ffn", "dimff")):
        blocks = [g for g in space.groups if (g.kind, g.site) == ("layer", site)]
        kept = [float(masks.get(g.name, torch.ones(1))) for g in blocks]
        blocks_mask = _random_mask(len(blocks), int(sum(kept)), generator)
        if any(g.name in masks for g in blocks):
            chosen |= {g.name: blocks_mask[i : i + 1] for i, g in enumerate(blocks)}
        inner = {g.layer: g for g in space.groups if (g.kind, g.site) == (kind, site)}
        layers = [g.layer for g, z in zip(blocks, kept, strict=True) if z]
        counts = [int(masks[inner[layer].name].sum()) for layer in layers if inner[layer].name in masks]
        drawn_layers = [g.layer for g, z in zip(blocks, blocks_mask.tolist(), strict=True) if z]
        for layer, count in zip(drawn_layers, counts, strict=False):
            group = inner[layer]
            size, each = group.section_size, count // group.sections
            chosen[group.name] = torch.cat([_random_mask(size, each, generator) for _ in range(group.sections)])
    return chosen


def _random_mask(size: int, kept: int, generator: torch.Generator) -> torch.Tensor:
    mask = torch.zeros(size)
    mask[torch.randperm(size, generator=generator)[:kept]] = 1.0
    return mask
