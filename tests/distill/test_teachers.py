from __future__ import annotations

import torch

from cook.distill.teachers import model_teacher, stream_weights
from tests.models.cpm_ant_tiny import random_batch, tiny_model
from tests.tiny_families import tiny_source


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
