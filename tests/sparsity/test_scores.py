from __future__ import annotations

import numpy as np
import pytest
import torch

from cook.sparsity.scores import ScoreAccumulator
from tests.sparsity.pattern_cases import network

MATRICES = network(1, 2, 4, 8, 8)[:2]


def random_tensors(seed, count=1):
    random = torch.Generator().manual_seed(seed)
    return [{m.path: torch.randn(m.shape, generator=random) for m in MATRICES} for _ in range(count)]


@pytest.mark.parametrize(
    ("score", "batch"),
    [("taylor_w2", lambda w, m, g: (g * w * (w * m)) ** 2), ("taylor", lambda w, m, g: (g * w * m) ** 2)],
)
def test_scores_are_the_sum_over_batches(score, batch):
    (weights,), gradients = random_tensors(0), random_tensors(1, 3)
    masks = {path: values > -0.5 for path, values in random_tensors(2)[0].items()}
    scorer = ScoreAccumulator(MATRICES, weights, masks=masks, score=score)
    for number, batch_gradients in enumerate(gradients):
        scorer.add(batch_gradients if number else iter(batch_gradients.items()))
    for path, found in scorer.scores().items():
        w, m = weights[path].double().numpy(), masks[path].double().numpy()
        wanted = sum(batch(w, m, g[path].double().numpy()) for g in gradients)
        # float64 sums of the same numbers; only the order of the products differs.
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)
        assert found.dtype == torch.float64 and (found[~masks[path]] == 0).all()


def test_the_gradient_is_that_of_the_masked_weight():
    """The specification's (∂L/∂M ∘ (W∘M))² by autograd through M itself."""
    (weights,), (inputs,) = random_tensors(0), random_tensors(5)
    path = MATRICES[0].path
    weight, mask = weights[path].double(), (inputs[path] > 0).double().requires_grad_()
    effective = (weight * mask).detach().requires_grad_()
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (x @ (weight * mask).T).tanh().sum().backward()
    (x @ effective.T).tanh().sum().backward()
    wanted = (mask.grad * weight * mask).square().detach()
    scorer = ScoreAccumulator(MATRICES[:1], weights, masks={path: mask.detach().bool()})
    scorer.add({path: effective.grad})
    torch.testing.assert_close(scorer.scores()[path], wanted, rtol=1e-12, atol=0)


def test_magnitude_needs_no_gradients():
    weights = random_tensors(0)[0]
    found = ScoreAccumulator(MATRICES, weights, score="magnitude").scores()
    assert all(torch.equal(found[path], weights[path].double().abs()) for path in found)


def test_small_contributions_are_not_lost():
    weights = {m.path: torch.ones(m.shape) for m in MATRICES}
    scorer = ScoreAccumulator(MATRICES, weights)
    scorer.add({path: torch.full_like(w, 1e4) for path, w in weights.items()})
    for _ in range(10):
        scorer.add({path: torch.full_like(w, 1.0) for path, w in weights.items()})
    assert (scorer.scores()[MATRICES[0].path] == 1e8 + 10).all()  # float32 would still say 1e8


def test_a_batch_without_a_gradient_is_refused():
    scorer = ScoreAccumulator(MATRICES, random_tensors(0)[0])
    with pytest.raises(AssertionError, match="without the gradient"):
        scorer.add({})


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_batch_that_overflowed_is_left_out(bad):
    (weights,), (good,) = random_tensors(0), random_tensors(1)
    scorer = ScoreAccumulator(MATRICES, weights)
    scorer.add(good)
    wanted = {path: score.clone() for path, score in scorer.scores().items()}
    spoilt = {path: gradient.clone() for path, gradient in good.items()}
    spoilt[MATRICES[1].path][0, 0] = bad
    scorer.add(spoilt)
    assert scorer.batches == 1 and all(torch.equal(scorer.scores()[path], wanted[path]) for path in wanted)
