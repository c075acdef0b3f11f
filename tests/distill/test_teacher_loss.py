from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cook.distill import teacher_loss as losses
from cook.distill.teacher_loss import hidden_error, token_divergence

TARGETS = torch.tensor([[3, -100, 5, 0], [-100, -100, 1, -100]])


def numpy_divergence(student, teacher, targets, temperature):
    """T² Σ p ln(p / q) in float64, over the positions with a target."""
    total = 0.0
    for row, column in zip(*np.nonzero(targets != -100), strict=True):
        p, q = (np.exp(x[row, column].astype(np.float64) / temperature) for x in (teacher, student))
        p, q = p / p.sum(), q / q.sum()
        total += (p * np.log(p / q)).sum()
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_the_formula(temperature):
    random = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 4, 11, generator=random) for _ in range(2))
    got = token_divergence(student, teacher, TARGETS, temperature).item()
    wanted = numpy_divergence(student.numpy(), teacher.numpy(), TARGETS.numpy(), temperature)
    assert got == pytest.approx(wanted, rel=1e-5)
    assert got > 0


def test_divergence_is_zero_for_equals_and_its_gradient_is_that_of_soft_cross_entropy():
    logits = torch.randn(2, 4, 11)
    assert token_divergence(logits, logits + 7, TARGETS, 2.0).item() == pytest.approx(0, abs=1e-5)
    student = torch.randn(2, 4, 11, requires_grad=True)
    token_divergence(student, logits, TARGETS, 2.0).backward()
    # d/ds of T²·KL is T·(softmax(s/T) − softmax(t/T)) where there is a target, and nothing elsewhere.
    wanted = 2.0 * (F.softmax(student / 2, -1) - F.softmax(logits / 2, -1)) * (TARGETS != -100)[..., None]
    torch.testing.assert_close(student.grad, wanted.detach(), rtol=1e-4, atol=1e-5)


def test_nothing_to_predict_costs_nothing():
    logits, none = torch.randn(2, 4, 11), torch.full((2, 4), -100)
    assert token_divergence(logits, logits + 1, none, 1.0).item() == 0
    assert hidden_error(logits, logits + 1, none).item() == 0


def test_half_precision_is_computed_in_full():
    student, teacher = torch.randn(2, 4, 11).bfloat16(), torch.randn(2, 4, 11).bfloat16()
    got = token_divergence(student, teacher, TARGETS, 1.0)
    assert got.dtype == torch.float32
    wanted = numpy_divergence(student.float().numpy(), teacher.float().numpy(), TARGETS.numpy(), 1.0)
    assert got.item() == pytest.approx(wanted, rel=1e-5)


def test_hidden_error_is_the_formula():
    a, b = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    chosen = TARGETS.numpy() != -100
    wanted = (((a.numpy() - b.numpy()).astype(np.float64)[chosen]) ** 2).mean(-1).sum()
    assert hidden_error(a, b, TARGETS).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_in_chunks_is_autograds(monkeypatch, dtype):
    monkeypatch.setitem(losses.CHUNK, "cpu", 3 * 11)  # three positions at a time
    random = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(3, 5, 11, generator=random).to(dtype) for _ in range(2))
    targets = torch.where(torch.rand(3, 5, generator=random) < 0.3, -100, 1)
    gradients, values = [], []
    for whole in (False, True):
        leaf = student.clone().requires_grad_()
        if whole:
            told = targets != -100
            p, q = ((x[told].float() / 1.5).log_softmax(-1) for x in (teacher, leaf))
            value = 1.5**2 * F.kl_div(q, p, reduction="sum", log_target=True)
        else:
            value = token_divergence(leaf, teacher, targets, 1.5)
        (value * 7e-4).backward()  # fp16 cannot hold such a gradient before the loss scale has multiplied it
        values.append(value.detach())
        gradients.append(leaf.grad.float())
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=0)
    # One rounding of the result, and one more of the gradient that bf16 keeps.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=tolerance, atol=1e-7)
    assert (gradients[0][targets == -100] == 0).all() and gradients[0].abs().max() > 1e-4


def test_rows_of_classes_have_one_target_each():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    targets = torch.tensor([0, 2, 1, 1])
    wanted = numpy_divergence(student[:, None].numpy(), teacher[:, None].numpy(), targets[:, None].numpy(), 2.0)
    assert token_divergence(student, teacher, targets, 2.0).item() == pytest.approx(wanted, rel=1e-5)


def test_a_projection_maps_the_student():
    a, b, weight = torch.randn(2, 4, 6), torch.randn(2, 4, 5), torch.randn(5, 6)
    chosen = TARGETS.numpy() != -100
    wanted = ((a.numpy()[chosen] @ weight.numpy().T - b.numpy()[chosen]) ** 2).mean(-1).sum()
    got = hidden_error(a, b, TARGETS, lambda states: F.linear(states, weight))
    assert got.item() == pytest.approx(wanted, rel=1e-5)
