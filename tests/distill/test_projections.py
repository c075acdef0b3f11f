from __future__ import annotations

import torch

from cook.distill.projections import LEARNING_RATE, Projections


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


def test_a_restored_state_goes_on_bit_for_bit(tmp_path):
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
