"""The tasks' losses against their formulas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cook.training.task_loss import class_loss, score_loss, span_loss, token_loss

# fp32 sums of a few terms
CLOSE = dict(rel=1e-5)


def log_p(logits: torch.Tensor) -> torch.Tensor:
    return logits.double() - logits.double().exp().sum(-1, keepdim=True).log()


def test_tokens_without_a_target_do_not_count():
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, -100, 4], [0, 2, -100]])
    wanted = -sum(float(log_p(logits)[b, t, targets[b, t]]) for b, t in ((0, 0), (0, 2), (1, 0), (1, 1)))
    assert float(token_loss(SimpleNamespace(logits=logits), {"targets": targets})) == pytest.approx(wanted, **CLOSE)


def test_classes():
    logits, targets = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    wanted = -float(log_p(logits)[torch.arange(4), targets].sum())
    assert float(class_loss(SimpleNamespace(logits=logits), {"targets": targets})) == pytest.approx(wanted, **CLOSE)


def test_scores():
    logits, targets = torch.tensor([[1.0], [2.5]]), torch.tensor([0.0, 5.0])
    assert float(score_loss(SimpleNamespace(logits=logits), {"targets": targets})) == pytest.approx(1.0 + 6.25)


def test_spans():
    starts, ends, targets = torch.randn(2, 6), torch.randn(2, 6), torch.tensor([[0, 0], [2, 5]])
    rows = torch.arange(2)
    wanted = -float(log_p(starts)[rows, targets[:, 0]].sum() + log_p(ends)[rows, targets[:, 1]].sum()) / 2
    output = SimpleNamespace(start_logits=starts, end_logits=ends)
    assert float(span_loss(output, {"targets": targets})) == pytest.approx(wanted, **CLOSE)


def test_half_precision_is_added_up_in_full():
    output, batch = SimpleNamespace(logits=torch.randn(4, 3).bfloat16()), {"targets": torch.zeros(4, dtype=torch.long)}
    assert class_loss(output, batch).dtype == torch.float32
