"""The table of cards, and the probe of a CPU."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

import pytest
import torch

from cook.base.errors import UserError
from cook.recipe.cards import CARDS, card_named, card_of_device, measured_cpu
from cook.recipe.estimate import Setup, step_seconds
from cook.recipe.model_shape import Block, Shape

BLOCKS = (
    Block(layer=0, weights=4 * 64**2, norms=64, inner=64, keys=64),
    Block(layer=0, weights=3 * 64 * 96, norms=64, inner=96, inputs=2),
)
SHAPE = Shape(parameters=10**5, hidden=64, vocab=100, tied=True, bias=False, blocks=BLOCKS)
SETUP = Setup(zero=0, half=False, ranks=1, rows=2, length=32)


@pytest.mark.parametrize("text", ["A100-80", "a100 80", "a100_80", "A10080"])
def test_a_card_is_found_in_any_spelling(text):
    assert card_named(text) is CARDS["A100-80"]


def test_an_unknown_card_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UserError, match="B300.*\n  wanted: H200, H100, .* or cpu"):
        card_named("B300")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Tesla V100", None),
        (None, None),
    ],
)
def test_a_device_is_found_by_its_drivers_name(device, name):
    assert card_of_device(device) is (CARDS[name] if name else None)


def test_half_precision_is_faster_than_fp32_and_cards_differ():
    half = [card.half for card in CARDS.values()]
    assert all(card.half > card.single for card in CARDS.values()) and len(set(half)) > 5
    assert all(1e9 < card.link < card.bandwidth < 1e13 for card in CARDS.values())


def test_a_model_without_logits_has_no_loss_to_measure():
    card = measured_cpu(replace(SHAPE, vocab=0), SETUP, budget=0.01)
    assert card.loss is None and 0 < step_seconds(replace(SHAPE, vocab=0), SETUP, card) < 10


def test_the_cpu_is_measured_and_the_threads_are_as_before():
    threads = torch.get_num_threads()
    card = measured_cpu(SHAPE, SETUP, budget=0.01)
    assert torch.get_num_threads() == threads
    rates = (card.memory, card.single, card.bandwidth, card.update, card.copies, card.loss, card.attention)
    assert all(rate is not None and isfinite(rate) and rate > 0 for rate in rates)
    assert card.shares_memory and not card.overlaps
    assert 0 < step_seconds(SHAPE, SETUP, card) < 10
