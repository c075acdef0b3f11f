from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.pruning.counts import parameters
from cook.pruning.mask_set import kept_groups
from cook.pruning.random_masks import random_masks_like
from tests.tiny_pruning import tiny_space

SPACE = tiny_space(num_layers=5)


def learned(seed, *, coarse=True, fine=True):
    """Masks as the stages make them: the same number of heads and dims in every kept block."""
    random = torch.Generator().manual_seed(seed)

    def choose(size, kept):
        mask = torch.zeros(size)
        mask[torch.randperm(size, generator=random)[:kept]] = 1
        return mask

    masks = {}
    if coarse:
        att, ffn = choose(5, 1 + seed % 4), choose(5, 1 + seed % 3)
        masks |= {f"layers.{i}.att": att[i : i + 1] for i in range(5)}
        masks |= {f"layers.{i}.ffn": ffn[i : i + 1] for i in range(5)}
    if fine:
        masks |= {g.name: choose(4, 2) for g in kept_groups(SPACE, masks, "heads")}
        masks |= {g.name: choose(20, 7) for g in kept_groups(SPACE, masks, "dimff")}
    return masks


def shape(masks):
    counts = {}
    for site, kind in (("att", "heads"), ("ffn", "dimff")):
        groups = kept_groups(SPACE, masks, kind)
        counts[site] = [int(masks.get(g.name, torch.ones(g.size)).sum()) for g in groups]
    return counts


@settings(deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_as_many_of_everything(seed, coarse, fine):
    masks = learned(seed, coarse=coarse, fine=fine) | {"hidden": (torch.arange(24) < 9).float()}
    random = random_masks_like(SPACE, masks, torch.Generator().manual_seed(seed))
    assert shape(random) == shape(masks) and random["hidden"].sum() == 9
    assert all(((m == 0) | (m == 1)).all() for m in random.values())
    kept = [{name: int(m.sum()) for name, m in chosen.items()} for chosen in (masks, random)]
    assert parameters(SPACE, kept[0]) == parameters(SPACE, kept[1])


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_uneven_blocks_are_copied_from_the_bottom_up(seed):
    random = torch.Generator().manual_seed(seed)
    masks = {g.name: (torch.rand(g.size, generator=random) < 0.3).float() for g in SPACE.groups}
    masks["layers.4.heads"] = torch.zeros(4)
    drawn = random_masks_like(SPACE, masks, random)
    kept, copied = shape(masks), shape(drawn)
    assert copied == kept
    assert all(len(kept[site]) == sum(masks[f"layers.{n}.{site}"] for n in range(5)) for site in kept)


def test_the_choice_is_random_and_the_generators():
    masks = learned(11)
    drawn = [random_masks_like(SPACE, masks, torch.Generator().manual_seed(seed)) for seed in (0, 0, *range(1, 200))]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    for layer in range(5):  # every block is drawn, none always
        times = sum(float(d[f"layers.{layer}.ffn"]) for d in drawn)
        assert 20 < times < 180
    heads = torch.stack([torch.stack(list(d[n] for n in d if n.endswith("heads"))).mean(0) for d in drawn]).mean(0)
    assert (heads - 0.5).abs().max() < 0.1


def test_a_mask_of_some_blocks_only():
    masks = {"layers.0.att": torch.zeros(1)}
    for seed in range(20):
        assert len(shape(random_masks_like(SPACE, masks, torch.Generator().manual_seed(seed)))["att"]) == 4
