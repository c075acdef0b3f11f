"""Gates of experts: they act on the scores of the router, so that what it chooses from is what is left.

A router returns its logits, and the weights and the numbers of the experts of each token. A gate z changes the scores
before the choice. With z = 0 an expert is never chosen and the others share its weight, as in the model without it;
with z = 1 nothing changes. The gradient of z is the mean over all tokens of the batch, to which only those contribute
that the expert computes, so that an expert that is rarely chosen has a small one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

CLOSED = -1e9
"""log z of a closed expert: its score is exactly 0, and that of all experts is defined even if all are closed."""
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Logits `[tokens, experts]`; weights `[tokens, chosen]`; numbers of the chosen experts, of the same shape."""


def routed(router: torch.nn.Module, output: Routed, z: torch.Tensor, scores: Literal["softmax", "sigmoid"]) -> Routed:
    """What a router returns with gated experts.

    Args:
        router: The router, with the attributes that transformers gives it.
        output: What it returned without gates.
        z: The gates, `[experts]`.
        scores: How it makes weights of scores.
    """
    logits, weights, _ = output
    precise = torch.promote_types(torch.float32, logits.dtype)
    z = z.to(precise)
    if scores == "sigmoid":
        now, chosen = _by_sigmoid(router, logits.to(precise), z, weights.shape[-1])
        return logits, now.to(weights.dtype), chosen
    gated = logits.to(precise) + torch.where(z > 0, z.clamp(min=1e-30).log(), CLOSED)
    # The softmax of the chosen scores is that of all scores, divided by the sum of the chosen ones.
    share, chosen = gated.softmax(-1).topk(weights.shape[-1], dim=-1)
    if getattr(router, "norm_topk_prob", True):
        share = share / share.sum(-1, keepdim=True)
    return gated.to(logits.dtype), share.to(weights.dtype), chosen


def _by_sigmoid(router: Any, logits: torch.Tensor, z: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and numbers of the experts that biased scores choose in the best groups (arXiv:2412.19437, 2.1.2)."""
    score = logits.sigmoid() * z
    choice = (score + router.e_score_correction_bias).masked_fill(z == 0, -torch.inf)
    by_group = choice.view(len(choice), router.num_group, -1)
    best = by_group.topk(2, dim=-1).values.sum(-1).topk(router.topk_group, dim=-1).indices
    is_best = torch.zeros(by_group.shape[:2], dtype=torch.bool, device=z.device).scatter(1, best, True)
    choice = by_group.masked_fill(~is_best[:, :, None], -torch.inf).flatten(1)
    chosen = choice.topk(count, dim=-1).indices
    weights = score.gather(1, chosen)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * router.routed_scaling_factor, chosen
