"""Gates of experts against routers without the closed experts, written in numpy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cook.pruning.routing import routed

TOKENS, EXPERTS, CHOSEN = 40, 8, 2


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax_router(logits, renormalised):
    """Weights `[tokens, experts]` of the two best experts."""
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    best = np.argsort(-share, 1)[:, :CHOSEN]
    weights = np.zeros_like(share)
    np.put_along_axis(weights, best, np.take_along_axis(share, best, 1), 1)
    return weights / weights.sum(1, keepdims=True) if renormalised else weights


def sigmoid_router(logits, bias, groups, best_groups):
    score = 1 / (1 + np.exp(-logits))
    biased = score + bias
    weights = np.zeros_like(score)
    size = logits.shape[1] // groups
    for token in range(len(logits)):
        by_group = [np.sort(biased[token, g * size : (g + 1) * size])[-2:].sum() for g in range(groups)]
        inside = np.argsort(by_group)[-best_groups:]
        allowed = [e for e in range(logits.shape[1]) if e // size in inside]
        best = sorted(allowed, key=lambda e: -biased[token, e])[:CHOSEN]
        weights[token, best] = score[token, best] / score[token, best].sum()
    return 2.5 * weights


def spread(weights, chosen, experts=EXPERTS):
    return torch.zeros(len(weights), experts, dtype=weights.dtype).scatter(1, chosen, weights)


def deepseek(bias, groups, best):
    return SimpleNamespace(
        e_score_correction_bias=bias,
        num_group=groups,
        topk_group=best,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )


def gated(router, logits, z, scores="softmax"):
    before = torch.zeros(len(logits), CHOSEN, dtype=torch.float64), torch.zeros(len(logits), CHOSEN, dtype=torch.long)
    return routed(router, (logits, *before), z, scores)


@pytest.mark.parametrize("renormalised", [True, False])
def test_closed_experts_are_as_if_they_were_not_there(renormalised):
    logits, z = random(TOKENS, EXPERTS), torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1])
    _, weights, chosen = gated(SimpleNamespace(norm_topk_prob=renormalised), logits, z)
    wanted = softmax_router(logits[:, z > 0].numpy(), renormalised)
    found = spread(weights, chosen).numpy()
    np.testing.assert_allclose(found[:, z > 0], wanted, rtol=1e-12)
    assert not found[:, z == 0].any()


@pytest.mark.parametrize("groups, best", [(1, 1), (2, 1), (4, 2)])
def test_closed_experts_are_out_before_the_bias_and_in_every_group(groups, best):
    logits, bias = random(TOKENS, 16), 3 * random(16, seed=1)
    z = torch.tensor([1.0, 0, 1, 1]).repeat(4)
    bias[z == 0] = 50  # which would be chosen, whatever their score
    _, weights, chosen = gated(deepseek(bias, groups, best), logits, z, "sigmoid")
    wanted = sigmoid_router(logits[:, z > 0].numpy(), bias[z > 0].numpy(), groups, best)
    found = spread(weights, chosen, 16).numpy()
    np.testing.assert_allclose(found[:, z > 0], wanted, rtol=1e-12)
    assert not found[:, z == 0].any()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_open_gates_change_nothing(scores):
    logits, router = random(TOKENS, EXPERTS), deepseek(torch.zeros(EXPERTS, dtype=torch.float64), 1, 1)
    same, weights, chosen = gated(router, logits, torch.ones(EXPERTS), scores)
    plain = softmax_router(logits.numpy(), True) if scores == "softmax" else sigmoid_router(logits.numpy(), 0, 1, 1)
    assert torch.equal(same, logits)
    np.testing.assert_allclose(spread(weights, chosen).numpy(), plain, rtol=1e-12)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_gradient_of_soft_gates_is_that_of_finite_differences(scores):
    logits, router = random(TOKENS, EXPERTS), deepseek(0.1 * random(EXPERTS, seed=2), 2, 1)
    value = random(TOKENS, EXPERTS, seed=3)
    z = (
        0.4 + 0.6 * torch.rand(EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ).requires_grad_()

    def loss(z):
        _, weights, chosen = gated(router, logits, z, scores)
        return (spread(weights, chosen) * value).sum()

    loss(z).backward()
    assert z.grad.ne(0).sum() >= EXPERTS - 1  # one of them may be in no chosen group
    for expert in range(EXPERTS):
        step = torch.zeros(EXPERTS, dtype=torch.float64)
        step[expert] = 1e-6
        with torch.no_grad():
            measured = (loss(z + step) - loss(z - step)) / 2e-6
        # The differences lose about half the digits of fp64.
        assert float(z.grad[expert]) == pytest.approx(float(measured), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_with_all_experts_closed_there_is_still_a_number(scores):
    logits, router = random(TOKENS, EXPERTS).float(), deepseek(torch.zeros(EXPERTS), 1, 1)
    z = torch.zeros(EXPERTS, requires_grad=True)
    _, weights, _ = gated(router, logits, z, scores)
    weights.sum().backward()
    assert weights.isfinite().all() and z.grad.isfinite().all()
