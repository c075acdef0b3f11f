from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cook.distill import teacher_loss as losses
from cook.distill.teacher_loss import LEARNING_RATE, Projections, hidden_error, token_divergence

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
    monkeypatch.setattr(losses, "CHUNK_ON_CPU", 3 * 11)  # three positions at a time
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


def steps(projections, count, seed):
    random = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for name, own, width in (("a", 3, 4), ("b", 5, 2)):
            (projections.apply(name, torch.randn(6, own, generator=random), width) ** 2).sum().backward()
        projections.update(projections.gradient())
    return projections


def test_it_is_adam_on_linear_maps():
    projections, random = steps(Projections(seed=1), 3, seed=0), torch.Generator().manual_seed(0)
    plain = steps(Projections(seed=1), 0, seed=0)
    for name, own, width in (("a", 3, 4), ("b", 5, 2)):
        plain.apply(name, torch.zeros(1, own), width)
    maps = {name: weight.detach().clone().requires_grad_() for name, weight in plain.weights.items()}
    optimizer = torch.optim.Adam(maps.values(), lr=LEARNING_RATE)
    for _ in range(3):
        for name, own in (("a", 3), ("b", 5)):
            ((torch.randn(6, own, generator=random) @ maps[name].T) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in projections.weights.items():
        torch.testing.assert_close(weight, maps[name], rtol=1e-5, atol=1e-7)
        assert float((weight - plain.weights[name]).detach().abs().max()) > LEARNING_RATE


def test_maps_start_alike_for_a_seed_and_keep_the_size_of_states():
    x = torch.randn(1000, 64)
    first, again, other = (Projections(seed=seed).apply("a", x, 32).detach() for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert 0.9 < float(first.std()) < 1.1


def test_a_restored_state_continues_bit_for_bit(tmp_path):
    whole = steps(steps(Projections(seed=1), 3, seed=0), 3, seed=5)
    torch.save(steps(Projections(seed=1), 3, seed=0).state_dict(), tmp_path / "p.pt")
    resumed = Projections(seed=2)
    resumed.load_state_dict(torch.load(tmp_path / "p.pt", weights_only=True))
    steps(resumed, 3, seed=5)
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in resumed.weights.items())
    empty = Projections(seed=1)
    empty.load_state_dict(Projections(seed=2).state_dict())
    assert not empty.weights


def test_micro_batches_add_up():
    x = torch.randn(4, 3)
    whole, parts = Projections(seed=1), Projections(seed=1)
    (whole.apply("a", x, 2) ** 2).sum().backward()
    for half in x.split(2):
        (parts.apply("a", half, 2) ** 2).sum().backward()
    torch.testing.assert_close(parts.gradient(), whole.gradient())
    assert parts.gradient().abs().sum() == 0, "the gradient was not cleared"
