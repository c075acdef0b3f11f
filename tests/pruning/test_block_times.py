from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cook.base.errors import UserError
from cook.pruning.block_times import BlockTimes, Curve, TimePricing, read_block_times
from cook.pruning.budgets import Targets, constraints
from cook.pruning.gates import Gates
from cook.pruning.mask_set import kept_counts
from tests.tiny_families import tiny_source

HEADS = Curve(shares=(0.0, 0.25, 0.5, 1.0), ms=(0.0, 0.7, 0.8, 2.0))  # falls in steps, as on a GPU
DIMS = Curve(shares=(0.0, 0.5, 1.0), ms=(0.0, 1.0, 3.0))
PRICING = TimePricing(sizes=(4, 10, 4), curves=(HEADS, DIMS, HEADS))


def share(openness: np.ndarray) -> float:
    """The kept share of time, by numpy's interpolation."""
    parts = np.split(openness, [4, 14])
    times = [np.interp(p.mean(), c.shares, c.ms) for p, c in zip(parts, PRICING.curves, strict=True)]
    return sum(times) / (2.0 + 3.0 + 2.0)


def test_the_tangent_is_that_of_the_interpolated_times():
    values = np.random.default_rng(0).uniform(0.1, 0.9, 18)
    costs, offset = PRICING.linearised(torch.tensor(values))
    assert float(costs @ torch.tensor(values)) + offset == pytest.approx(share(values), abs=1e-12)
    for unit in range(18):
        step = np.eye(18)[unit] * 1e-6
        slope = (share(values + step) - share(values - step)) / 2e-6
        assert float(costs[unit]) == pytest.approx(slope, rel=1e-6)


def test_the_removed_share_is_counted_unit_by_unit():
    order = np.random.default_rng(1).permutation(18)
    kept, wanted = np.ones(18), [0.0]
    for unit in order:
        kept[unit] = 0
        wanted.append(1 - share(kept))
    assert PRICING.removed_after(torch.tensor(order)).tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.fixture
def times() -> BlockTimes:
    return BlockTimes(rest=1.5, heads=HEADS, dimff=DIMS, num_layers=2, settings={})


def test_a_budget_in_milliseconds_is_met_to_one_unit(times):
    source = tiny_source("llama")
    space = source.adapter.space(source.config)
    learned = [*space.of("heads"), *space.of("dimff")]
    whole = times.total(space, {})
    assert whole == pytest.approx(1.5 + 2.0 * len(space.of("heads")) + 3.0 * len(space.of("dimff")))
    limit = 0.55 * whole
    targets = Targets(scope="global", cost="ms", limit=limit, times=times)
    gates = Gates({g.name: g.size for g in learned}, constraints(space, learned, targets), steps=60, seed=0)
    gradients = np.random.default_rng(2)
    scale = gradients.lognormal(0, 2, len(gates.values))
    for step in range(1, 61):
        gates.draw(step)
        gates.update(torch.tensor(-scale * gradients.uniform(0.5, 1.5, len(scale)), dtype=torch.float32), step)
    # The tangent of a step is exact where no size crosses a measured point: a step moves a size by little.
    assert float(gates.expected_sparsity()) == pytest.approx(gates.constraints[0].target, abs=2e-3)
    kept = kept_counts(gates.binary())
    one_unit = max(HEADS.slope(torch.linspace(0, 1, 50).double()).max() / 2, DIMS.slope(torch.ones(1)).max() / 8)
    assert times.total(space, kept) == pytest.approx(limit, abs=float(one_unit))
    assert len(set(kept.values())) > 2, "the sizes follow the gradients"


def test_a_budget_out_of_reach_names_the_range(times):
    source = tiny_source("llama")
    space = source.adapter.space(source.config)
    learned = [*space.of("heads"), *space.of("dimff")]
    for limit in (1.4, 1e3):
        with pytest.raises(UserError, match=r"(?s)cannot be reached.*above 1\.5 and up to"):
            constraints(space, learned, Targets(scope="global", cost="ms", limit=limit, times=times))


def test_a_table_is_read_as_it_was_written(times, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(json.dumps(times.as_json()))
    assert read_block_times(path) == times
    path.write_text(json.dumps({"rest": 1.0}))
    with pytest.raises(UserError, match="not a table of block times"):
        read_block_times(path)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_a_budget_in_bytes_counts_the_weights_and_cache_of_the_small_model(name):
    from cook.export.pruned_folder import reshaped_source
    from cook.families.source import load_model

    source = tiny_source(name)
    space = source.adapter.space(source.config)
    learned = [*space.of("heads"), *space.of("dimff")]

    def size(masks: dict[str, torch.Tensor]) -> int:
        """By the small model itself: its weights, and the cache that it returns for 50 tokens."""
        model = load_model(reshaped_source(source, space, masks))
        with torch.no_grad():
            cache = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
        cached = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.keys is not None)
        return 2 * (sum(p.numel() for p in model.parameters()) + cached * 10)

    whole, least = size({}), size({g.name: torch.eye(g.size)[0] for g in learned})
    limit = 0.5 * (whole + least)
    targets = Targets(scope="global", cost="bytes", limit=limit, context=50, number_bytes=2)
    gates = Gates({g.name: g.size for g in learned}, constraints(space, learned, targets), steps=20, seed=0)
    gates.values = torch.rand(len(gates.values), generator=torch.Generator().manual_seed(3)) + 0.01
    for number in range(len(learned)):  # no block ends empty: its norm would stay or go
        gates.values[sum(g.size for g in learned[:number])] = 2.0
    masks = gates.binary()
    one_unit = max((whole - size({g.name: torch.ones(g.size).index_fill(0, torch.tensor([0]), 0)})) for g in learned)
    assert size(masks) == pytest.approx(limit, abs=one_unit)


WIDE_TIMES = {
    "hidden": Curve(shares=(0.25, 0.5, 1.0), ms=(5.0, 9.0, 16.5)),
    "head_dims": Curve(shares=(1 / 3, 1.0), ms=(13.0, 16.5)),
}


@pytest.fixture
def wide_times() -> BlockTimes:
    return BlockTimes(rest=1.5, heads=HEADS, dimff=DIMS, num_layers=3, settings={}, wide=WIDE_TIMES)


def whole_ms(space, kept) -> float:
    """The rule in words, by numpy: blocks and the rest, attention by its heads' size, all by the hidden size."""

    def left(name):
        size = next(g.size for g in (*space.every,) if g.name == name)
        return kept.get(name, size) / size

    attention = sum(
        left(f"layers.{n}.att") * np.interp(left(f"layers.{n}.heads"), HEADS.shares, HEADS.ms) for n in range(3)
    )
    others = 1.5 + sum(
        left(f"layers.{n}.ffn") * np.interp(left(f"layers.{n}.dimff"), DIMS.shares, DIMS.ms) for n in range(3)
    )
    hidden, dims = WIDE_TIMES["hidden"], WIDE_TIMES["head_dims"]
    attention *= 1 - (16.5 - np.interp(left("head_dims"), dims.shares, dims.ms)) / 6.0
    return (attention + others) * np.interp(left("hidden"), hidden.shares, hidden.ms) / 16.5


@pytest.mark.parametrize("kinds", [("heads", "dimff", "hidden"), ("layer", "heads", "dimff", "head_dims", "hidden")])
def test_a_budget_in_milliseconds_covers_the_whole_model(wide_times, kinds):
    source = tiny_source("llama")
    space = source.adapter.space(source.config)
    learned = [group for kind in kinds for group in space.of(kind)]
    [constraint] = constraints(space, learned, Targets(scope="global", cost="ms", limit=8.0, times=wide_times))
    assert constraint.target == pytest.approx(1 - 8.0 / 16.5)
    sizes, pricing = [group.size for group in learned], constraint.pricing

    def share(values):
        parts = np.split(values, np.cumsum(sizes)[:-1])
        return whole_ms(space, {g.name: part.sum() for g, part in zip(learned, parts, strict=True)}) / 16.5

    values = np.random.default_rng(0).uniform(0.4, 0.9, sum(sizes))
    costs, offset = pricing.linearised(torch.tensor(values))
    assert float(costs @ torch.tensor(values)) + offset == pytest.approx(share(values), abs=1e-12)
    for unit in (0, 9, 20, len(values) - 33, len(values) - 1):
        step = np.eye(len(values))[unit] * 1e-6
        assert float(costs[unit]) == pytest.approx((share(values + step) - share(values - step)) / 2e-6, rel=1e-5)

    gates = Gates({g.name: g.size for g in learned}, [constraint], steps=1, seed=0)
    gates.values = torch.rand(len(gates.values), generator=torch.Generator().manual_seed(1)) + 0.1
    kept = kept_counts(gates.binary())
    assert wide_times.total(space, kept) == pytest.approx(whole_ms(space, kept))
    # The largest unit is a pair of head dimensions: 1.75 ms of the whole model.
    assert wide_times.total(space, kept) == pytest.approx(8.0, abs=0.9)


def test_a_table_without_hidden_sizes_is_named(times, wide_times, tmp_path):
    source = tiny_source("llama")
    space = source.adapter.space(source.config)
    learned = [*space.of("heads"), *space.of("hidden")]
    with pytest.raises(UserError, match="no times for several numbers of hidden"):
        constraints(space, learned, Targets(scope="global", cost="ms", limit=8.0, times=times))
    path = tmp_path / "times.json"
    path.write_text(json.dumps(wide_times.as_json()))
    assert read_block_times(path) == wide_times
