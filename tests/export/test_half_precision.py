"""Models in 16 bits: every family computes the same before and after reshaping."""

from __future__ import annotations

import pytest
import torch

from cook.evaluation.equality import largest_difference, masked_model, unrounded, written_model
from cook.export.model_folder import write_model_folder
from cook.export.pruned_folder import prune_to_folder
from cook.families.source import open_model
from cook.pruning.mask_set import consistent, fits
from cook.pruning.units import WIDE
from tests.families.tiny_models import some
from tests.tiny_families import FAMILIES, MOE, MORE, MORE_ENCODERS, tiny_source
from tests.tiny_pruning import random_masks

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def masks_of_every_kind(space):
    """Of blocks, heads, dims, and of hidden and head dims; of experts where all blocks keep as many."""
    masks = random_masks(space, 1, blocks=0.9)
    masks |= {g.name: some(g.size, max(2, g.size * 7 // 10), seed=1) for g in space.every if g.kind in WIDE}
    return consistent(space, {g.name: masks[g.name] for g in space.every if g.name in masks and fits(g, masks[g.name])})


@pytest.mark.parametrize("name", [*FAMILIES, *MOE, *MORE, *MORE_ENCODERS])
def test_every_family_is_exact_in_16_bits(tmp_path, name):
    made = tiny_source(name)
    tensors = {name: tensor.bfloat16() for name, tensor in made.tensors.items()}
    write_model_folder(tmp_path / "model", made.adapter, made.config, tensors.items())
    source = open_model(tmp_path / "model")
    space = source.adapter.space(source.config, source.adapter.head_units(source.config)[0])
    masks = masks_of_every_kind(space)
    prune_to_folder(source, space, masks, tmp_path / "small")
    masked, _ = masked_model(source, space, masks, torch.float64)
    exact = unrounded(source, space, masks)
    small = written_model(tmp_path / "small", torch.float64, exact=exact)
    # Everything is computed in fp64, also norms and softmaxes, and outputs are compared in fp32.
    assert largest_difference(masked, small, [{"input_ids": IDS}]) < 2e-7
    assert all(tensor.dtype == torch.bfloat16 for tensor in open_model(tmp_path / "small").tensors.values())
    if exact:  # the rounding is there, and is seen
        rounded = written_model(tmp_path / "small", torch.float64)
        assert largest_difference(masked, rounded, [{"input_ids": IDS}]) > 1e-4
