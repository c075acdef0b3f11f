from __future__ import annotations

import pytest
import torch

from cook.base.errors import UserError
from cook.distill.taps import Pair, Place, Tap, check_pairs, read_pair
from cook.models.ragged import Absent


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.gone = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4), Absent("value", None)

    def forward(self, x):
        return self.second(self.first(x))


def test_pairs_are_read():
    assert read_pair("[post]a.b:[pre]c") == Pair(Place("post", "a.b"), Place("pre", "c"))
    assert str(read_pair("[post]a.b:[pre]c")) == "[post]a.b:[pre]c"


def test_all_that_is_missing_is_told_at_once():
    pairs = {
        "mse_hidn_module": [read_pair("[post]first:[post]first"), read_pair("[post]third:[post]first")],
        "mse_att_module": [read_pair("[post]gone:[post]fourth")],
    }
    with pytest.raises(UserError) as caught:
        check_pairs(pairs, Model(), Model())
    message = str(caught.value)
    assert "3 place(s)" in message and "first:[post]first" not in message.replace("third:[post]first", "")
    assert "mse_hidn_module: [post]third:[post]first: the student has no module 'third'" in message
    assert "mse_att_module: [post]gone:[post]fourth: the student no longer has the block 'gone'" in message
    assert "mse_att_module: [post]gone:[post]fourth: the teacher has no module 'fourth'" in message


def test_a_tap_keeps_an_armed_pass_once():
    model, x = Model(), torch.randn(5, 2)
    taps = [Tap(model, Place("pre", "second")), Tap(model, Place("post", "second"))]
    model(x)
    assert [tap.take() for tap in taps] == [None, None]
    for tap in taps:
        tap.arm()
    model(torch.randn(5, 2))
    out = model(x)
    assert torch.equal(taps[0].take(), model.first(x)) and torch.equal(taps[1].take(), out)
    model(x)
    assert [tap.take() for tap in taps] == [None, None]
    for tap in taps:
        tap.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_of_several_outputs_the_first_is_kept_and_inputs_may_have_names():
    class Block(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states + 1, None

    model = torch.nn.Module()
    model.block = Block()
    taps = [Tap(model, Place("pre", "block")), Tap(model, Place("post", "block"))]
    for tap in taps:
        tap.arm()
    model.block(hidden_states=torch.zeros(2))
    assert [tap.take().tolist() for tap in taps] == [[0, 0], [1, 1]]
