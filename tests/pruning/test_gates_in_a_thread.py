"""Gates that move in a thread, as they do beside an accelerator."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.pruning.test_gates import RELAXATIONS, advance, make


@pytest.fixture
def background(monkeypatch):
    """An accelerator, as far as the gates know."""
    monkeypatch.setattr("cook.pruning.gates.accelerator", lambda: torch.device("cuda"))


@pytest.mark.parametrize("start", ["open", "taylor"])
@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_gates_that_move_in_a_thread_are_the_same(relaxation, start, request):
    inline = make(relaxation=relaxation, start=start)
    request.getfixturevalue("background")
    threaded = make(relaxation=relaxation, start=start)
    for step in range(1, 61):
        for gates in (inline, threaded):
            advance(gates, step, step)
        reader = ("expected_sparsity", "openness", "binary", "multipliers", "values", "state_dict")[step % 6]
        found = [getattr(gates, reader) for gates in (inline, threaded)]
        torch.testing.assert_close(*(f() if callable(f) else f for f in found), rtol=0, atol=0)
        assert torch.equal(inline.targets(step), threaded.targets(step))


def test_the_step_goes_on_while_the_gates_move_and_whatever_reads_them_waits(background, monkeypatch):
    may_move, gates = threading.Event(), make()
    step = gates.controller.step
    monkeypatch.setattr(gates.controller, "step", lambda *a, **k: may_move.wait(60) and step(*a, **k))
    z = gates.draw(1)
    gates.update(-z, 1)
    threading.Timer(0.2, may_move.set).start()
    assert not may_move.is_set() and not torch.equal(gates.draw(2), z)
    assert may_move.is_set()


def test_an_error_in_the_thread_is_raised_by_the_next_reader(background, monkeypatch):
    gates = make()
    monkeypatch.setattr(gates.controller, "step", lambda *a, **k: 1 / 0)
    gates.draw(1)
    gates.update(torch.ones(8), 1)
    with pytest.raises(ZeroDivisionError):
        gates.draw(2)
