"""Random masks of a given shape: the baseline that learned masks must beat."""

from __future__ import annotations

import torch

from cook.pruning.mask_set import Masks, consistent
from cook.pruning.units import WIDE, PruningSpace


def random_masks_like(space: PruningSpace, masks: Masks, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random masks that keep as many blocks, heads, experts, FFN, head and hidden dimensions as `masks`.

    The kept blocks and the kept units inside them are drawn at random; the r-th kept block gets as many units as
    the r-th kept block of `masks`, in its key-value groups as many as there, in another order.
    """
    chosen: dict[str, torch.Tensor] = {}
    for site, kinds in (("att", ("heads",)), ("ffn", ("experts", "dimff"))):
        blocks = [g for g in space.groups if (g.kind, g.site) == ("layer", site)]
        kept = [float(masks.get(g.name, torch.ones(1))) for g in blocks]
        blocks_mask = _random_mask(len(blocks), int(sum(kept)), generator)
        if any(g.name in masks for g in blocks):
            chosen |= {g.name: blocks_mask[i : i + 1] for i, g in enumerate(blocks)}
        for kind in kinds:
            inner = {g.layer: g for g in space.groups if (g.kind, g.site) == (kind, site)}
            layers = [g.layer for g, z in zip(blocks, kept, strict=True) if z and g.layer in inner]
            counts = [
                [int(part.sum()) for part in masks[inner[layer].name].split(inner[layer].spans)]
                for layer in layers
                if inner[layer].name in masks
            ]
            drawn_blocks = [g.layer for g, z in zip(blocks, blocks_mask.tolist(), strict=True) if z]
            for layer, each in zip([n for n in drawn_blocks if n in inner], counts, strict=False):
                spans = inner[layer].spans
                if len(set(each)) > 1 and len(set(spans)) == 1:
                    each = [each[n] for n in torch.randperm(len(each), generator=generator).tolist()]
                drawn = [_random_mask(size, kept, generator) for size, kept in zip(spans, each, strict=True)]
                chosen[inner[layer].name] = torch.cat(drawn)
    for kind in WIDE:
        if kind in masks:
            chosen[kind] = _random_mask(len(masks[kind]), int(masks[kind].sum()), generator)
    return consistent(space, chosen)


def _random_mask(size: int, kept: int, generator: torch.Generator) -> torch.Tensor:
    mask = torch.zeros(size)
    mask[torch.randperm(size, generator=generator)[:kept]] = 1.0
    return mask
