"""The search for blocks on losses whose best answer is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.pruning.counts import unit_parameters
from cook.pruning.search import search_blocks
from tests.tiny_pruning import tiny_space

SPACE = tiny_space(num_layers=5)
BLOCKS = SPACE.of("layer")
SIZES = {group.name: unit_parameters(SPACE, group) for group in BLOCKS}
TOTAL = sum(SIZES.values())


def removed(masks):
    return {name for name, mask in masks.items() if not mask.all()}


class Loss:
    """A sum of what each block is worth, and of pairs that are worth something only together; counts its calls."""

    def __init__(self, worth, pairs=()):
        self.worth, self.pairs, self.calls = worth, pairs, 0

    def __call__(self, masks):
        self.calls += 1
        gone = removed(masks)
        return 2.0 + sum(self.worth[name] for name in gone) + sum(w for *pair, w in self.pairs if gone.issuperset(pair))


@pytest.mark.parametrize("unit", ["block", "layer"])
def test_useless_blocks_go_and_no_others(unit):
    useless = ["layers.1.att", "layers.1.ffn", "layers.3.att", "layers.3.ffn"]
    loss = Loss({name: 0.0 if name in useless else 0.1 for name in SIZES})
    masks = search_blocks(loss, SPACE, BLOCKS, sum(SIZES[name] for name in useless) / TOTAL, unit=unit)
    assert removed(masks) == set(useless) and masks.keys() == SIZES.keys()


def test_what_only_the_rest_makes_dear_is_measured_again():
    worth = {name: 1.0 * SIZES[name] / TOTAL for name in SIZES}
    worth |= {f"layers.{n}.att": 0.0 for n in (0, 1, 2)}
    # The third of three useless blocks is dear once the first is gone; another one is cheaper then.
    worth["layers.4.att"] = 0.1 * SIZES["layers.4.att"] / TOTAL
    pairs = [("layers.0.att", "layers.1.att", 5.0)]
    masks = search_blocks(Loss(worth, pairs), SPACE, BLOCKS, 3 * SIZES["layers.0.att"] / TOTAL)
    assert removed(masks) == {"layers.0.att", "layers.2.att", "layers.4.att"}


def test_what_went_too_early_is_exchanged():
    worth = {name: 1.0 * SIZES[name] / TOTAL for name in SIZES}
    # The first one is the cheapest alone and dear beside every other one; two others are cheap together.
    worth |= {f"layers.{n}.att": 0.01 * (n + 1) for n in range(3)}
    pairs = [("layers.0.att", f"layers.{n}.att", 3.0) for n in range(1, 5)]
    pairs += [("layers.0.att", f"layers.{n}.ffn", 3.0) for n in range(5)]
    masks = search_blocks(Loss(worth, pairs), SPACE, BLOCKS, 2 * SIZES["layers.0.att"] / TOTAL)
    assert removed(masks) == {"layers.1.att", "layers.2.att"}


def test_a_layer_goes_whole():
    worth = {name: 0.0 if name.endswith("att") else 0.1 + 0.1 * int(name.split(".")[1]) for name in SIZES}
    masks = search_blocks(Loss(worth), SPACE, BLOCKS, 0.4, unit="layer")
    assert removed(masks) == {f"layers.{n}.{site}" for n in (0, 1) for site in ("att", "ffn")}


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.95), st.integers(0, 99), st.sampled_from(["block", "layer"]))
def test_the_target_is_met_to_half_a_unit_with_few_measurements(target, seed, unit):
    random = torch.Generator().manual_seed(seed)
    loss = Loss({name: float(torch.rand((), generator=random)) for name in SIZES})
    masks = search_blocks(loss, SPACE, BLOCKS, target, unit=unit)
    gone = sum(SIZES[name] for name in removed(masks))
    most = max(SIZES.values()) if unit == "block" else TOTAL / 5
    assert abs(gone - target * TOTAL) <= most / 2 * (1 + 1e-9)
    # A sum has nothing to exchange: one round of exchanges finds none.
    assert loss.calls <= 1 + len(BLOCKS) * (1 + 8) + len(BLOCKS) + 3 * 8
