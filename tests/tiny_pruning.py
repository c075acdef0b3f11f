"""Spaces, masks and models of a tiny CPM-Ant for the tests of pruning."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from cook.families.cpm_ant import ADAPTER
from cook.models.cpm_ant import CpmAntForCausalLM
from cook.pruning.family import ModelSource
from cook.pruning.mask_set import consistent
from cook.pruning.units import PruningSpace
from tests.models.cpm_ant_tiny import SIZES, tiny_model

KEPT = st.sampled_from(["all", "some", "one", "none"])


def config_of(**changes: Any) -> dict[str, Any]:
    """The tiny model's config.json."""
    return {"model_type": "cook_cpm_ant"} | SIZES | changes


def tiny_space(**changes: Any) -> PruningSpace:
    return ADAPTER.space(config_of(**changes))


def source_of(model: CpmAntForCausalLM, path, **changes: Any) -> ModelSource:
    """A model in memory as if it had been opened from `path`."""
    return ModelSource(adapter=ADAPTER, config=config_of(**changes), tensors=model.state_dict(), path=path)


def tiny_source(path, seed: int = 0, **changes: Any) -> tuple[CpmAntForCausalLM, ModelSource]:
    model = tiny_model(seed, **changes)
    return model, source_of(model, path, **changes)


@st.composite
def masks_of(draw: st.DrawFn, space: PruningSpace) -> dict[str, torch.Tensor]:
    """Random masks of blocks, heads and dims together, with their extremes: all, one, none of a group, no mask."""
    masks = {}
    for group in space.groups:
        if draw(st.integers(0, 5)) == 0:
            continue
        keep = draw(KEPT if group.kind != "layer" else st.sampled_from(["all", "all", "none"]))
        mask = torch.zeros(group.size)
        if keep == "all":
            mask[:] = 1
        elif keep == "one":
            mask[draw(st.integers(0, group.size - 1))] = 1
        elif keep == "some":
            mask[:] = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=group.size, max_size=group.size)))
        masks[group.name] = mask
    return consistent(space, masks)


def random_masks(space: PruningSpace, seed: int, *, blocks: float = 0.7, units: float = 0.5) -> dict[str, torch.Tensor]:
    """Masks that keep each block and each unit with these probabilities."""
    random = torch.Generator().manual_seed(seed)
    masks = {
        g.name: (torch.rand(g.size, generator=random) < (blocks if g.kind == "layer" else units)).float()
        for g in space.groups
        if g.kind != "keys"
    }
    return consistent(space, masks)
