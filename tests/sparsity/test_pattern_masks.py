from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.sparsity.pattern_masks import apply_masks, make_masks, sparsity_table
from cook.sparsity.spec import NAMES, PatternSpec, Quirks
from tests.sparsity import pattern_oracle as oracle
from tests.sparsity.pattern_cases import by_layer, network, random_scores, turned

HISTORICAL = Quirks.historical()
NOT_JOINT = [name for name in NAMES if name != "m4n2_2d"]


def expected(scores, matrices, spec, s, head):
    """What the oracle keeps, by path."""
    layers, flat = by_layer(scores, matrices), turned(scores, matrices)
    g, old = spec.granularity, spec.quirks.input_row_heads
    per_layer = {
        "whole_head": lambda layer: oracle.heads(layer, head, s, False, old, g),
        "head_size": lambda layer: oracle.heads(layer, head, s, True, old, g),
        "granularity": lambda layer: {role: oracle.gran(score, g, s) for role, score in layer.items()},
        "joint_qkv": lambda layer: oracle.joint(layer, s, g),
        "local_kn": lambda layer: {
            role: oracle.local_kn(score, spec.local_granularities[role not in oracle.QKV], s)
            for role, score in layer.items()
        },
    }
    if spec.name in per_layer:
        masks = {layer: per_layer[spec.name](roles) for layer, roles in layers.items()}
        return {m.path: masks[m.layer][m.role] for m in matrices}
    if spec.name == "vector_wise":
        return {p: oracle.vectors(x, spec.vector, s, spec.quirks.vector_keeps_all) for p, x in flat.items()}
    if spec.name == "block_wise":
        return {p: oracle.blocks(x, spec.block, s) for p, x in flat.items()}
    if spec.name == "tile_wise_k":
        return oracle.tile_k(flat, g, s)
    if spec.name == "tile_wise_kn":
        return oracle.tile_kn(flat, g, s)
    if spec.name == "unstructured":
        threshold = np.percentile(np.concatenate([x.ravel() for x in flat.values()]), s)
        return {p: x > threshold for p, x in flat.items()}
    return {p: oracle.two_of_four(x) for p, x in flat.items()}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NOT_JOINT),
    st.booleans(),
    st.sampled_from(["floats", "ties", "zeros"]),
    st.integers(0, 10**6),
    st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 4)),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([3, 4, 16]),
    st.floats(0, 100),
)
def test_every_pattern_is_the_oracles(name, historical, kind, seed, sizes, grain, vector, s):
    heads, head, hidden, inner = sizes
    # Multiples of 4: G = B = 1, 2, 4 divide, and 2:4 finds its fours.
    matrices = network(2, heads * 4, head, hidden * 4, inner * 8)
    scores = random_scores(matrices, seed, kind)
    quirks = HISTORICAL if historical or name == "tile_wise_kn" else Quirks()
    spec = PatternSpec(
        type=name, granularity=grain, block=grain, vector=vector, local_granularities=(grain, 4), quirks=quirks
    )
    masks = turned(make_masks(scores, matrices, spec, sparsity=s), matrices)
    wanted = expected(scores, matrices, spec, float(int(s)) if quirks.whole_percents else s, head)
    for path, mask in masks.items():
        assert np.array_equal(mask, wanted[path]), path


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["whole_head", "head_size"]), st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.floats(0, 100)
)
def test_heads_that_share_keys_go_together(name, seed, shared, s):
    matrices = network(2, 4, 4, 8, 16, shared=shared)
    scores = random_scores(matrices, seed)
    spec = PatternSpec(type=name, granularity=4)
    masks = turned(make_masks(scores, matrices, spec, sparsity=s), matrices)
    wanted = expected(scores, matrices, spec, s, 4)
    assert all(np.array_equal(mask, wanted[path]) for path, mask in masks.items())


def runs(mask_KN):
    """How many runs of kept columns have the same rows."""
    return len(list(itertools.groupby(tuple(column) for column in mask_KN.T if column.any())))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.lists(st.floats(1, 99), min_size=1, max_size=3))
@example(151, 2, [61.625, 61.15625])  # one column more would remove too much
def test_corrected_type_8_reaches_the_sparsity_to_a_row_tile_over_stages(seed, grain, stages):
    matrices = network(2, 4, 4, 24, 48)
    spec = PatternSpec(type=8, granularity=grain)
    total = sum(m.inputs * m.outputs for m in matrices)
    masks = None
    for s in sorted(stages):
        scores = random_scores(matrices, seed)
        if masks:
            apply_masks(scores, masks)
        before, masks = masks, make_masks(scores, matrices, spec, sparsity=s, previous=masks)
        table = sparsity_table(matrices, masks)
        # Rows go whole: half a tile of G kept columns is the most that rounding leaves.
        assert abs(table.total - s / 100) * total <= grain / 2 + 1e-6
        for path, mask in turned(masks, matrices).items():
            assert runs(mask) <= mask.shape[1] / grain, path  # the tiles stay tiles
        if before:
            assert all(not bool((masks[p] & ~before[p]).any()) for p in masks)


def test_corrected_type_8_does_not_punish_wide_matrices():
    matrices = network(4, 4, 4, 16, 256)
    shares = {}
    for quirks in (Quirks(), Quirks(raw_width_norms=True)):
        spec = PatternSpec(type=8, granularity=8, quirks=quirks)
        table = sparsity_table(matrices, make_masks(random_scores(matrices, 0), matrices, spec, sparsity=50))
        by_role = {role: [r.sparsity for r in table.rows if r.role == role] for role in ("key", "output")}
        shares[quirks] = {role: np.mean(values) for role, values in by_role.items()}
        assert table.total == pytest.approx(0.5, abs=0.001)
    fair, raw = shares.values()
    assert abs(fair["output"] - fair["key"]) < 0.3 < 0.45 < raw["output"] - raw["key"], shares


def test_the_nominal_total_of_historical_type_8():
    matrices = network(4, 4, 4, 64, 64)  # of about one K, so that the norms are comparable
    spec = PatternSpec(type=8, granularity=4, quirks=dataclasses.replace(HISTORICAL, raw_width_norms=False))
    table = sparsity_table(matrices, make_masks(random_scores(matrices, 1), matrices, spec, sparsity=50))
    assert table.total == pytest.approx(1 - 0.5**2, abs=0.03)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 10**6), st.floats(0, 100), st.floats(0, 100))
def test_pruned_stays_pruned(name, seed, first, second):
    matrices = network(1, 4, 4, 16, 32)
    spec = PatternSpec(type=name, granularity=4, block=4, local_granularities=(4, 4))
    one = make_masks(random_scores(matrices, seed), matrices, spec, sparsity=first)
    # Fresh scores, not even zero where pruned: the masks alone hold it.
    two = make_masks(random_scores(matrices, seed + 1), matrices, spec, sparsity=second, previous=one)
    assert all(not bool((two[path] & ~one[path]).any()) for path in two)


@pytest.mark.parametrize("name", ["vector_wise", "tile_wise_kn"])
def test_the_quirk_that_revives(name):
    matrices = network(2, 4, 4, 16, 32)
    spec = PatternSpec(type=name, granularity=4, quirks=Quirks(revive=True, raw_width_norms=True))
    one = make_masks(random_scores(matrices, 3), matrices, spec, sparsity=60)
    scores = random_scores(matrices, 4)
    if name == "vector_wise":  # a tie at zero: nothing in the vectors is worth anything
        scores = random_scores(matrices, 4, "zeros")
    two = make_masks(scores, matrices, spec, sparsity=70, previous=one)
    assert any(bool((two[path] & ~one[path]).any()) for path in two)


def test_vectors_keep_at_least_one():
    matrices = network()
    scores = random_scores(matrices, 0)
    corrected = make_masks(scores, matrices, PatternSpec(type=4), sparsity=97)
    historical = make_masks(scores, matrices, PatternSpec(type=4, quirks=HISTORICAL), sparsity=97)
    assert sparsity_table(matrices, historical).total == 0
    for mask in turned(corrected, matrices).values():
        for start in range(0, len(mask), 16):
            assert (mask[start : start + 16].sum(0) == 1).all()


@pytest.mark.parametrize("s", [62.5, 12.5])
def test_fractions_of_a_percent_count(s):
    matrices = network(1, 4, 4, 64, 256)
    scores = random_scores(matrices, 0)
    new, old = (
        make_masks(scores, matrices, PatternSpec(type="unstructured", quirks=q), sparsity=s)
        for q in (Quirks(), Quirks(whole_percents=True))
    )
    assert sparsity_table(matrices, new).total == pytest.approx(s / 100, abs=1e-3)
    assert sparsity_table(matrices, old).total == pytest.approx(int(s) / 100, abs=1e-3)


def test_two_of_four_both_ways():
    matrices = network(1, 4, 4, 16, 32)
    scores = random_scores(matrices, 0)
    for path, mask in turned(make_masks(scores, matrices, PatternSpec(type="m4n2_2d"), sparsity=0), matrices).items():
        score = turned(scores, matrices)[path]
        for i in range(0, len(mask), 4):
            for j in range(0, mask.shape[1], 4):
                block = mask[i : i + 4, j : j + 4]
                assert (block.sum(0) == 2).all() and (block.sum(1) == 2).all()
                # no exchange of two rows' choices that keeps the columns' counts may be better
                kept = (score[i : i + 4, j : j + 4] * block).sum()
                assert kept >= max(_swaps(score[i : i + 4, j : j + 4], block)) - 1e-12


def _swaps(score, block):
    yield 0.0
    for a in range(4):
        for b in range(4):
            changed = block.copy()
            changed[[a, b]] = changed[[b, a]]
            yield (score * changed).sum()


def test_empty_matrices_and_totals():
    matrices = network(1, 0, 4, 8, 8)
    for name in ("whole_head", "granularity", "vector_wise", "block_wise", "tile_wise_k", "tile_wise_kn", "m4n2_1d"):
        spec = PatternSpec(type=name, granularity=4, block=4)
        masks = make_masks(random_scores(matrices, 0), matrices, spec, sparsity=50)
        table = sparsity_table(matrices, masks)
        assert table.rows[0].sparsity == 1.0 and 0.3 < table.total < 0.7, name
    gone = {path: torch.zeros_like(mask) for path, mask in masks.items()}
    assert sparsity_table(matrices, gone, gone).of_stage == 1.0


def test_the_quirk_that_divides_by_what_is_left():
    matrices = network()
    masks = {m.path: torch.ones(m.shape, dtype=torch.bool) for m in matrices}
    masks[matrices[1].path][:] = False
    assert sparsity_table(matrices, masks).rows[1].sparsity == 1.0
    quirks = Quirks(empty_ratio_fails=True)
    with pytest.raises(UserError, match=f"{matrices[1].path}: all its weights are pruned"):
        sparsity_table(matrices, masks, quirks=quirks)
    masks[matrices[1].path][0, 0] = True
    # The oracle: numpy's own division, which must not be by zero.
    with np.errstate(divide="raise"):
        ratios = [np.float64(mask.numel()) / mask.sum().numpy() for mask in masks.values()]
    table = sparsity_table(matrices, masks, quirks=quirks)
    assert [row.total / row.kept for row in table.rows] == ratios


def test_totals_are_against_dense():
    matrices = network()
    half = {m.path: torch.arange(m.shape[1]).expand(m.shape) % 2 == 0 for m in matrices}
    quarter = {m.path: torch.arange(m.shape[1]).expand(m.shape) % 4 == 0 for m in matrices}
    table = sparsity_table(matrices, quarter, half)
    assert (table.total, table.of_stage) == (0.75, 0.5)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"type": 2, "granularity": 5}, ("12", "5")),
        ({"type": 7, "granularity": 7}, ("12", "7")),
        ({"type": 5, "block": 5}, ("12", "5")),
        ({"type": 3, "granularity": 9}, ("12", "9")),
    ],
)
def test_what_does_not_divide_is_named(options, numbers):
    matrices = network()
    with pytest.raises(UserError) as error:
        make_masks(random_scores(matrices, 0), matrices, PatternSpec(**options), sparsity=50)
    assert all(number in str(error.value) for number in numbers)


@pytest.mark.parametrize("s", [-1, 101, float("nan")])
def test_a_sparsity_out_of_range(s):
    matrices = network()
    with pytest.raises(UserError, match="out of range"):
        make_masks(random_scores(matrices, 0), matrices, PatternSpec(type=2, granularity=4), sparsity=s)


def test_masks_are_applied_in_place():
    linear = torch.nn.Linear(4, 4)
    weight = linear.weight
    mask = torch.eye(4, dtype=torch.bool)
    apply_masks(linear, {"weight": mask})
    assert linear.weight is weight and torch.equal(weight != 0, mask)
