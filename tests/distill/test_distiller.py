from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cook.base.errors import UserError
from cook.distill.distiller import Distiller, RowDistiller, hidden_error, token_divergence
from tests.models.cpm_ant_tiny import random_batch, tiny_model

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


def test_a_teacher_that_has_read_the_rows_beforehand():
    teacher, student = torch.randn(6, 3), torch.randn(4, 3)
    rows = torch.tensor([5, 0, 0, 3])
    batch = {"rows": rows, "targets": torch.tensor([0, 2, 1, 0])}
    got = RowDistiller(teacher, scale=0.5, temperature=2.0)(batch, student)
    p, q = (F.softmax(logits / 2.0, -1).double().numpy() for logits in (teacher[rows], student))
    assert got.item() == pytest.approx(0.5 * 4 * (p * np.log(p / q)).sum(), rel=1e-5)


def test_hidden_error_is_the_formula():
    a, b = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    chosen = TARGETS.numpy() != -100
    wanted = (((a.numpy() - b.numpy()).astype(np.float64)[chosen]) ** 2).mean(-1).sum()
    assert hidden_error(a, b, TARGETS).item() == pytest.approx(wanted, rel=1e-5)


LAST = "encoder.layers.2"
NORM = "encoder.output_layernorm"


def setup(seed_teacher=1, **options):
    student, teacher = tiny_model(0), tiny_model(seed_teacher)
    batch = random_batch(0, student.config)
    targets = torch.randint(0, 61, batch["input"].shape, generator=torch.Generator().manual_seed(0))
    batch["targets"] = targets.masked_fill(torch.rand(targets.shape, generator=torch.Generator()) < 0.3, -100)
    settings = {"ce_scale": 0.0, "ce_temp": 1.0, "mse_hidn_scale": 0.0, "hidden_pairs": ()} | options
    return student, teacher, batch, Distiller(student, teacher, **settings)


def forward(model, batch):
    return model(**{name: value for name, value in batch.items() if name != "targets"}, output_hidden_states=True)


@pytest.mark.parametrize(("pair", "state", "factor"), [
    (f"[pre]{NORM}:[pre]{NORM}", None, 1.0),
    (f"[post]{NORM}:[post]{NORM}", -1, 1.0),
    (f"[pre]{LAST}:[post]encoder.layers.1", 2, 1.0),  # the same place by its two names
])  # fmt: skip
def test_both_losses_with_their_weights(pair, state, factor):
    student, teacher, batch, distiller = setup(ce_scale=0.5, ce_temp=2.0, mse_hidn_scale=0.25, hidden_pairs=[pair])
    out = forward(student, batch)
    got = distiller(batch, out.logits)
    distiller.remove()
    wanted_out = forward(teacher, batch)
    logits = numpy_divergence(
        out.logits.detach().numpy(), wanted_out.logits.numpy(), batch["targets"].numpy(), 2.0
    )
    seen = []
    if state is None:
        for model in (student, teacher):
            handle = model.get_submodule(LAST).register_forward_hook(lambda _m, _i, o: seen.append(o))
            forward(model, batch)
            handle.remove()
    else:
        seen = [out.hidden_states[state], wanted_out.hidden_states[state]]
    assert got.item() == pytest.approx(0.5 * logits + 0.25 * hidden_error(*seen, batch["targets"]).item(), rel=1e-4)


def test_the_student_learns_and_the_teacher_does_not():
    student, teacher, batch, distiller = setup(
        ce_scale=1.0, mse_hidn_scale=1.0, hidden_pairs=[f"[post]{LAST}:[post]{LAST}", f"[post]{NORM}:[post]{NORM}"]
    )
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        loss = distiller(batch, forward(student, batch).logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in student.parameters())
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_a_student_like_its_teacher_loses_nothing():
    student, _, batch, distiller = setup(
        seed_teacher=0, ce_scale=1.0, mse_hidn_scale=1.0, hidden_pairs=[f"[post]{LAST}:[post]{LAST}"]
    )
    assert distiller(batch, forward(student, batch).logits).item() == pytest.approx(0, abs=1e-5)


def test_pairs_read_the_models_that_they_name():
    # Student's place and teacher's place are not interchangeable.
    pair = f"[post]encoder.layers.0:[post]{LAST}"
    student, teacher, batch, distiller = setup(mse_hidn_scale=1.0, hidden_pairs=[pair])
    out = forward(student, batch)
    got = distiller(batch, out.logits)
    seen = []
    teacher.get_submodule(LAST).register_forward_hook(lambda _m, _i, o: seen.append(o))
    forward(teacher, batch)
    assert got.item() == pytest.approx(hidden_error(out.hidden_states[1], seen[0], batch["targets"]).item(), rel=1e-4)


def test_hooks_are_removed():
    student, teacher, batch, distiller = setup(mse_hidn_scale=1.0, hidden_pairs=[f"[pre]{LAST}:[pre]{LAST}"])
    distiller.remove()
    for model in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_unknown_module_is_refused():
    with pytest.raises(UserError, match="no module 'encoder.layers.9'"):
        setup(mse_hidn_scale=1.0, hidden_pairs=[f"[post]encoder.layers.9:[post]{LAST}"])
