"""What is charged to each kind of units adds up to what was removed."""

from __future__ import annotations

import pytest
import torch

from cook.pruning.counts import parameters
from cook.pruning.mask_set import kept_counts
from cook.pruning.spending import spending
from tests.tiny_families import tiny_source
from tests.tiny_pruning import random_masks, tiny_space

FAMILIES = ("llama", "llama, tied", "qwen3", "phi3", "gpt2", "opt", "bert")
SPACES = {"cpm_ant": tiny_space()}
for name in FAMILIES:
    source = tiny_source(name)
    SPACES[name] = source.adapter.space(source.config, source.adapter.head_units(source.config)[-1])


def some_masks(space, seed):
    masks = random_masks(space, seed)
    for group in space.every:
        if group.layer < 0:
            masks[group.name] = (torch.arange(group.size) % 3 > 0).float()
    return masks


@pytest.mark.parametrize("name", SPACES)
def test_the_charges_add_up(name):
    space = SPACES[name]
    for seed in range(3):
        kept = kept_counts(some_masks(space, seed))
        found = spending(space, kept)
        removed = parameters(space) - parameters(space, kept)
        # What stays of a block whose last bias still acts is charged to the block; each row is rounded.
        residue = sum(space.shapes[path][0] for group in space.of("layer") for path in group.residue)
        assert -residue - len(found) <= removed - sum(row.parameters for row in found) <= len(found)
        assert all(row.parameters >= 0 and row.after <= row.before for row in found)


@pytest.mark.parametrize("kind", ["heads", "dimff", "head_dims", "hidden", "layer"])
def test_a_kind_that_went_alone_is_charged_with_everything(kind):
    space = SPACES["llama"]
    own = space.of(kind)
    kept = {group.name: group.size - 1 for group in own}
    kept |= {"layers.0.keys": 3} if kind == "heads" else {}
    [row] = [row for row in spending(space, kept) if row.parameters]
    assert row.kind == kind and row.parameters == parameters(space) - parameters(space, kept)
    members = own[0].members
    assert (row.before, row.after) == (sum(g.size for g in own) * members, sum(g.size - 1 for g in own) * members)
