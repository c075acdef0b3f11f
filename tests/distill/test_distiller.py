from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cook.base.errors import UserError
from cook.distill.distiller import Distiller, RowDistiller, model_teacher, stream_weights
from cook.distill.taps import read_pair
from cook.distill.teacher_loss import Projections, hidden_error
from tests.distill.test_teacher_loss import numpy_divergence
from tests.models.cpm_ant_tiny import random_batch, tiny_model
from tests.tiny_families import tiny_source

LAST = "encoder.layers.2"
NORM = "encoder.output_layernorm"


ATTENTION = "encoder.layers.1.self_att.self_attention"


def setup(seed_teacher=1, sizes=None, **options):
    student, teacher = tiny_model(0), tiny_model(seed_teacher, **(sizes or {}))
    batch = random_batch(0, student.config)
    targets = torch.randint(0, 61, batch["input"].shape, generator=torch.Generator().manual_seed(0))
    batch["targets"] = targets.masked_fill(torch.rand(targets.shape, generator=torch.Generator()) < 0.3, -100)
    settings = {"ce_scale": 0.0, "ce_temp": 1.0} | options
    for key in ("hidden_pairs", "attention_pairs"):
        settings[key] = [read_pair(pair) for pair in settings.get(key, ())]
    return student, teacher, batch, Distiller(student, model_teacher(teacher), **settings)


def forward(model, batch):
    return model(**{name: value for name, value in batch.items() if name != "targets"}, output_hidden_states=True)


@pytest.mark.parametrize(
    ("pair", "state", "factor"),
    [
        (f"[pre]{NORM}:[pre]{NORM}", None, 1.0),
        (f"[post]{NORM}:[post]{NORM}", -1, 1.0),
        (f"[pre]{LAST}:[post]encoder.layers.1", 2, 1.0),  # the same place by its two names
    ],
)
def test_both_losses_with_their_weights(pair, state, factor):
    student, teacher, batch, distiller = setup(ce_scale=0.5, ce_temp=2.0, mse_hidn_scale=0.25, hidden_pairs=[pair])
    out = forward(student, batch)
    got = distiller(batch, out.logits)
    distiller.remove()
    wanted_out = forward(teacher, batch)
    logits = numpy_divergence(out.logits.detach().numpy(), wanted_out.logits.numpy(), batch["targets"].numpy(), 2.0)
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


def test_attention_pairs_have_a_weight_of_their_own():
    student, teacher, batch, distiller = setup(
        mse_hidn_scale=0.5,
        hidden_pairs=[f"[post]{LAST}:[post]{LAST}"],
        mse_att_scale=2.0,
        attention_pairs=[f"[post]{ATTENTION}:[post]{ATTENTION}"],
    )
    out = forward(student, batch)
    got = distiller(batch, out.logits)
    distiller.remove()
    seen = {}
    for model in (student, teacher):
        for path in (LAST, ATTENTION):
            model.get_submodule(path).register_forward_hook(
                lambda _m, _i, o, path=path: seen.setdefault(path, []).append(o)
            )
        forward(model, batch)
    hidden, attention = (hidden_error(*seen[path], batch["targets"]).item() for path in (LAST, ATTENTION))
    assert got.item() == pytest.approx(0.5 * hidden + 2.0 * attention, rel=1e-4) and attention > 0


WIDER = {"dim_model": 30}


def test_widths_that_differ_are_told_all_at_once():
    pairs = [f"[post]{LAST}:[post]{LAST}", f"[pre]{NORM}:[pre]{NORM}"]
    attention = [f"[post]{ATTENTION}:[post]{ATTENTION}"]
    student, _, batch, distiller = setup(
        sizes=WIDER, mse_hidn_scale=1.0, hidden_pairs=pairs, mse_att_scale=1.0, attention_pairs=attention
    )
    with pytest.raises(UserError, match="3 place") as caught:
        distiller(batch, forward(student, batch).logits)
    assert all(f"{pair}: the widths differ, 24 and 30" in str(caught.value) for pair in (*pairs, *attention))
    assert "mse_hidn_proj" in str(caught.value)


def test_a_projection_is_learned_where_widths_differ_and_only_there():
    pair, same = f"[post]{LAST}:[post]{LAST}", f"[post]{NORM}:[post]{NORM}"
    projections = Projections(seed=1)
    student, _, batch, distiller = setup(
        sizes=WIDER, mse_hidn_scale=1.0, hidden_pairs=[pair, same], projections=projections
    )
    losses = []
    student.requires_grad_(False)
    for _ in range(40):
        with torch.enable_grad():
            loss = distiller(batch, forward(student, batch).logits) / 40
        loss.backward()
        projections.update(projections.gradient())
        losses.append(loss.item())
    assert set(projections.weights) == {pair, same} and losses[-1] < 0.9 * losses[0]
    equal = Projections(seed=1)
    student, _, batch, distiller = setup(mse_hidn_scale=1.0, hidden_pairs=[pair], projections=equal)
    distiller(batch, forward(student, batch).logits)
    assert not equal.weights and equal.gradient() is None


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("[post]encoder.layers", "module is not called"),
        ("[post]position_bias", "module returns a tensor of shape"),
    ],
)
def test_what_is_no_state_of_positions_is_refused(place, said):
    student, _, batch, distiller = setup(mse_hidn_scale=1.0, hidden_pairs=[f"{place}:{place}"])
    with pytest.raises(UserError, match=f"the student's {said}(.|\\n)*the teacher's {said}"):
        distiller(batch, forward(student, batch).logits)


def test_only_the_pass_with_gradients_is_kept_and_not_for_longer():
    student, _, batch, distiller = setup(mse_hidn_scale=1.0, hidden_pairs=[f"[post]{LAST}:[post]{LAST}"])
    [tap] = distiller._student_taps
    with torch.no_grad():
        forward(student, batch)
    assert tap.take() is None, "an evaluation"
    student.train()
    student.gradient_checkpointing_enable()
    loss = distiller(batch, forward(student, batch).logits)
    loss.backward()  # calls the layers again
    assert tap.take() is None and student.encoder.layers[0].ffn.ffn.w_out.weight.grad is not None


def test_a_teacher_that_has_read_the_rows_beforehand():
    teacher, student = torch.randn(6, 3), torch.randn(4, 3)
    rows = torch.tensor([5, 0, 0, 3])
    batch = {"rows": rows, "targets": torch.tensor([0, 2, 1, 0])}
    got = RowDistiller(teacher, scale=0.5, temperature=2.0)(batch, student)
    p, q = (F.softmax(logits / 2.0, -1).double().numpy() for logits in (teacher[rows], student))
    assert got.item() == pytest.approx(0.5 * 4 * (p * np.log(p / q)).sum(), rel=1e-5)


def test_a_teacher_is_asked_and_never_trained():
    model = tiny_model(0, dropout_p=0.5).train()
    teacher, batch = model_teacher(model), random_batch(0, model.config)
    asked = [teacher.forward({**batch, "targets": batch["input"]}).logits for _ in range(2)]
    assert torch.equal(*asked) and not asked[0].requires_grad and teacher.module is model
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_call_form_is_the_teachers():
    source = tiny_source("llama, tied")
    model = source.adapter.build(source.config)
    ids = torch.arange(6)[None]
    batch = {"input": ids, "position": ids, "segment": ids, "targets": ids}
    logits = model_teacher(model, source.adapter.inputs).forward(batch).logits
    torch.testing.assert_close(logits, model(input_ids=ids).logits.detach())


class Guest:
    """Counts the weights that are away from home while a module runs, on a device that is only another storage."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.most = model, 0
        self.homes = {parameter: parameter.data_ptr() for parameter in model.parameters()}
        for module in model.modules():
            module.register_forward_hook(self.count)

    def count(self, *_):
        away = {
            parameter.data_ptr(): parameter.numel()
            for parameter, home in self.homes.items()
            if parameter.data_ptr() != home
        }
        self.most = max(self.most, sum(away.values()))


def test_streamed_weights_are_away_only_while_their_module_runs(monkeypatch):
    """The CPU stands for the device: what visits it is made a copy, as a move between devices is."""
    source = tiny_source("llama, tied")
    for model, batch in (
        (tiny_model(0), random_batch(0, tiny_model(0).config)),
        (source.adapter.build(source.config).eval(), {"input_ids": torch.arange(6)[None]}),
    ):
        wanted = model(**batch).logits.detach()
        guest = Guest(model)
        real = torch.Tensor.to
        monkeypatch.setattr(
            torch.Tensor,
            "to",
            lambda tensor, *args, real=real, **named: (
                real(tensor, *args, **named).clone() if named.get("non_blocking") else real(tensor, *args, **named)
            ),
        )
        stream_weights(model, torch.device("cpu"))
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, wanted)
        monkeypatch.undo()
        largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
        assert 0 < guest.most <= largest
        assert all(parameter.data_ptr() == home for parameter, home in guest.homes.items())
