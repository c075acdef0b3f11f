from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.sparsity.kernels import sparse_ways
from cook.sparsity.kernels.sparse_layers import BlockWiseLinear, TileWiseLinear
from cook.sparsity.tiles import sparse_linear, tiles_of

BLOCK = 4


def tile_mask(seed, inputs, columns, uneven):
    """Tiles of the given widths, each with rows of its own; some columns of none, some tiles of few rows."""
    random = torch.Generator().manual_seed(seed)
    pieces = []
    for number, width in enumerate(columns):
        count = inputs // 2 if not uneven else (number * inputs) // max(1, len(columns))
        rows = torch.zeros(inputs, dtype=torch.bool)
        rows[torch.randperm(inputs, generator=random)[:count]] = True
        kept = torch.rand(width, generator=random) > (0.3 if uneven else -1)
        pieces.append(rows[:, None] & kept)
    return torch.cat(pieces, 1)


def made(seed, mask, dtype=torch.float32, block=None):
    random = torch.Generator().manual_seed(seed)
    inputs, outputs = mask.shape
    weight = torch.randn(outputs, inputs, generator=random).to(dtype) * mask.T
    bias = torch.randn(outputs, generator=random).to(dtype)
    layer = sparse_linear(weight, bias, tiles_of(mask, block=block))
    return layer, weight, bias


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([1, 3, 300]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_way_is_the_dense_product(seed, inputs, columns, uneven, rows, dtype):
    layer, weight, bias = made(seed, tile_mask(seed, inputs, columns, uneven), dtype)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    wanted = F.linear(x.float(), weight.float(), bias.float())
    # Sums in another order: fp32 to rounding, bf16 to its 8 bits of the result.
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    assert torch.equal(layer.dense_weight(), weight)
    plan = layer.plan()
    for way in sparse_ways.ways(plan, x.T).values():
        for transposed in (False, True):
            found = sparse_ways.by(way, plan, x.T.contiguous() if transposed else x, transposed=transposed)
            torch.testing.assert_close((found.T if transposed else found).float(), wanted, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).float(), wanted, **tolerance)
        torch.testing.assert_close(layer.columns(x.T.contiguous()).T.float(), wanted, **tolerance)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.integers(4, 40),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from([1, 7, 300]),
)
def test_single_weights_are_multiplied_one_by_one(seed, inputs, outputs, share, rows):
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(inputs, outputs, generator=random) < share
    mask[0, 0] = True
    layer, weight, bias = made(seed, mask)
    x = torch.randn(rows, inputs, generator=random)
    ways = sparse_ways.ways(layer.plan(), x.T)
    assert ("entries" in ways) == (len(layer.sizes) == 1 and mask.float().mean() < sparse_ways.MOST_ENTRIES)
    for way in ways.values():
        found = sparse_ways.by(way, layer.plan(), x.T.contiguous(), transposed=True).T
        torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    assert "entries" not in sparse_ways.ways(layer.plan(), x.T.bfloat16())  # there is no such product in bf16


def test_blocks_are_gathered_whole():
    random = torch.Generator().manual_seed(0)
    mask = (torch.rand(6, 5, generator=random) > 0.5).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    mask[:, 4:8] = False
    layer, weight, bias = made(0, mask, block=BLOCK)
    assert isinstance(layer, BlockWiseLinear) and len(layer.inputs) == sum(r for r, _ in layer.sizes) // BLOCK
    x = torch.randn(7, 24, generator=random)
    for way in sparse_ways.ways(layer.plan(), x.T).values():
        found = sparse_ways.by(way, layer.plan(), x.T.contiguous(), transposed=True).T
        torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    # a mask that is not made of blocks is not taken for one
    mask[0] = ~mask[0]
    assert tiles_of(mask, block=BLOCK).block == 1


@pytest.mark.parametrize("block", [None, BLOCK])
def test_gradients_are_those_of_the_dense_layer(block):
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) > 0.4
    mask = mask.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    layer, weight, bias = made(3, mask, block=block)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight.requires_grad_()
    bias.requires_grad_()
    layer(mine).square().sum().backward()
    F.linear(theirs, weight, bias).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.grad)
    # A plan made before the weights changed must not be used after.
    torch.testing.assert_close(layer.dense_weight(), weight.grad * mask.T, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, weight.grad * mask.T, bias), rtol=1e-3, atol=1e-2)


def test_the_choice_is_measured_once_and_falls_back_to_dense(monkeypatch):
    layer, weight, bias = made(0, tile_mask(0, 24, [8, 8, 8], False))
    other, *_ = made(1, tile_mask(1, 24, [8, 8, 8], False))
    measured = []
    speed = {"dense": 1.0, "loop": 0.5, "batch": 0.6}

    def seconds(plan, ways, *_):
        measured.append(sorted(ways))
        return {name: [speed[name]] * 3 for name in ways}

    monkeypatch.setattr(sparse_ways, "has_native", lambda _dtype: False)
    monkeypatch.setattr(sparse_ways, "_seconds", seconds)
    monkeypatch.setattr(sparse_ways, "_CHOICES", {})
    x = torch.randn(24, 4)
    with torch.no_grad():
        layer.columns(x), layer.columns(x), other.columns(x), layer.columns(torch.randn(24, 3))
        assert measured == [["batch", "dense", "loop"]]  # 3 and 4 rows share a choice, and so do equal layers
        assert [way.__name__ for way in layer.plan().chosen.values()] == ["_loop"]
        speed |= {"loop": 0.97, "batch": 0.96}  # within the noise of measuring
        layer.columns(torch.randn(24, 64))
    assert [way.__name__ for way in layer.plan().chosen.values()] == ["_loop", "_dense"]


def test_a_way_that_wins_by_one_lucky_time_or_in_a_slow_round_of_the_dense_product_is_not_taken():
    fastest = sparse_ways._fastest
    assert fastest({"dense": [1.0, 1.0, 1.0], "loop": [0.5, 1.2, 1.2]}) == "dense"
    assert fastest({"dense": [1.0, 9.0, 9.0], "loop": [0.97, 1.5, 1.5]}) == "dense"
    assert fastest({"dense": [1.0, 5.0, 1.1], "loop": [0.5, 9.0, 0.5]}) == "loop"


def test_threads_do_not_share_workspaces():
    mask = tile_mask(0, 64, [16] * 4, False)
    layers = [made(seed, mask)[0] for seed in range(4)]
    x = torch.randn(64, 200)
    wanted = [layer.dense_weight() @ x + layer.bias.detach()[:, None] for layer in layers]
    failures = []

    def work(number):
        with torch.no_grad():
            for _ in range(50):
                plan = layers[number].plan()
                for way in sparse_ways.ways(plan, x).values():
                    if not torch.allclose(sparse_ways.by(way, plan, x, transposed=True), wanted[number], atol=1e-3):
                        failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_layers_without_anything_left():
    layer, _, bias = made(0, torch.zeros(5, 3, dtype=torch.bool))
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(2, 5)), bias.expand(2, 3))
        assert torch.equal(layer.columns(torch.ones(5, 2)).T, bias.expand(2, 3))
    assert torch.equal(layer(torch.ones(2, 5, requires_grad=True)), bias.expand(2, 3))
    assert layer(torch.ones(0, 5)).shape == (0, 3)


def test_a_layer_says_what_it_is():
    assert "tiles=1, density=0.500" in repr(TileWiseLinear(4, 2, [(2, 2)]))
