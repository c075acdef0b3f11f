from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from cook.evaluation.equality import largest_difference
from tests.models.cpm_ant_tiny import random_batch, tiny_model


def fake(*logits):
    """A model whose answers are given."""
    answers = iter(logits)
    return lambda **_: SimpleNamespace(logits=next(answers))


def compare(first, second, batches=({},)):
    return largest_difference(fake(*first), fake(*second), batches)


def test_the_largest_difference_over_the_largest_logit():
    a, b = torch.tensor([[[1.0, -4.0]]]), torch.tensor([[[1.5, -4.0]]])
    assert compare([a], [b]) == 0.125 and compare([a], [a]) == 0
    assert compare([a, 10 * a], [b, 10 * a], [{}, {}]) == pytest.approx(0.5 / 40)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["first", "second", "both"])
def test_what_is_not_finite_is_never_equal(bad, where):
    good, broken = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    broken[0, 0, 0] = bad
    first, second = (broken if where in (name, "both") else good for name in ("first", "second"))
    assert compare([first], [second]) == math.inf
    # Also when a good batch comes before or after it.
    assert compare([good, first], [good, second], [{}, {}]) == math.inf
    assert compare([first, good], [second, good], [{}, {}]) == math.inf


def test_all_zero_logits():
    zero, one = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert compare([zero], [zero]) == 0 and compare([zero], [one]) == math.inf


def test_padding_does_not_count():
    a, b = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    b[0, 1:], b[1, 2] = 5, math.nan
    batch = {"length": torch.tensor([1, 2])}
    assert compare([a], [b], [batch]) == 0
    assert compare([a], [b], [{"length": torch.tensor([2, 2])}]) == 4


def test_no_batches_prove_nothing():
    with pytest.raises(AssertionError, match="nothing to compare"):
        compare([], [], [])


def test_real_models():
    first, second = tiny_model(0), tiny_model(0)
    batches = [random_batch(seed, first.config) | {"targets": torch.zeros(3, 17)} for seed in range(2)]
    assert largest_difference(first, second, batches) == 0
    with torch.no_grad():
        second.encoder.layers[1].ffn.ffn.w_out.weight[0, 0] += 0.1
    assert largest_difference(first, second, batches) > 1e-5
