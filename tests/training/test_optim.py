"""The optimizers' groups, the tasks' losses, and the learning rate's shape against values worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from cook.config.types import TrainingConfig
from cook.training.optim import (
    class_loss,
    finetuning_adamw,
    learning_rate,
    pretraining_adamw,
    score_loss,
    span_loss,
    token_loss,
)

# fp32 sums of a few terms
CLOSE = dict(rel=1e-5)


def training(**changes) -> TrainingConfig:
    return TrainingConfig(
        **{"steps": 100, "train_batch_size": 1, "micro_batch_size": 1, "learning_rate": 2.0, "warmup": 0.1, **changes}
    )


def rates(config: TrainingConfig) -> list[float]:
    return [learning_rate(config, step) for step in range(1, config.steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_warmup_is_a_straight_line_to_the_peak(schedule):
    assert rates(training(schedule=schedule))[:10] == pytest.approx([0.2 * step for step in range(1, 11)])


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("cosine", 1.1, 0.2), ("linear", 1.1, 0.2), ("constant", 2.0, 2.0)]
)
def test_the_decay_ends_at_its_minimum(schedule, middle, last):
    values = rates(training(schedule=schedule))
    assert values[54] == pytest.approx(middle) and values[99] == pytest.approx(last)  # step 55 is half-way from 10
    assert values[10:] == sorted(values[10:], reverse=True)


def test_the_cosine_is_one():
    quarter = learning_rate(training(warmup=0.0, min_learning_rate=0.0), 25)
    assert quarter == pytest.approx(2.0 * (1 + math.cos(math.pi / 4)) / 2)


def test_one_step_and_no_warmup_and_all_warmup():
    assert rates(training(steps=1, warmup=0.0)) == [0.2]
    assert rates(training(steps=1, warmup=1.0)) == [2.0]
    assert rates(training(steps=4, warmup=1.0)) == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_frozen_weights_have_no_learning_rate():
    assert set(rates(training(train_weights=False))) == {0.0}


def test_fine_tuning_decays_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1, bias=False))
    model[2].requires_grad_(False)
    optimizer = finetuning_adamw(model, training(weight_decay=0.5))
    groups = [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in optimizer.param_groups]
    assert groups == [(0.5, [(4, 3)]), (0.0, [(4,), (4,), (4,)])]
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, False, False, False, False]


def test_pretraining_decays_everything_alike():
    optimizer = pretraining_adamw(torch.nn.Linear(3, 4), training(weight_decay=0.5))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5]
    assert optimizer.defaults["betas"] == (0.9, 0.95)


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
