import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cook.data.order as order_module
from cook.data.order import Draws, EpochOrder, updated_weights


@pytest.fixture(params=["sorted", "cipher"])
def kind(request, monkeypatch):
    if request.param == "cipher":
        monkeypatch.setattr(order_module, "SORTED_UP_TO", 0)
    return request.param


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4096, 4097])
def test_every_epoch_is_a_permutation_of_its_own(kind, size):
    order = EpochOrder(size, (7,))
    epochs = [order.rows(np.arange(size), epoch) for epoch in (0, 1, 5)]
    assert all(sorted(rows.tolist()) == list(range(size)) for rows in epochs)
    if size > 50:
        assert len({tuple(rows.tolist()) for rows in epochs}) == 3
        assert EpochOrder(size, (8,)).rows(np.arange(size), 0).tolist() != epochs[0].tolist()


@given(st.integers(1, 5000), st.lists(st.integers(0, 10**6), min_size=1, max_size=8), st.integers(0, 9))
def test_a_place_alone_is_the_same_as_among_others(size, places, epoch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "SORTED_UP_TO", 2500)
        some = np.array(places) % size
        whole = EpochOrder(size, (3,)).rows(np.arange(size), epoch)
        assert EpochOrder(size, (3,)).rows(some, epoch).tolist() == whole[some].tolist()


def test_both_kinds_are_pinned(monkeypatch):
    # A change of either would break resumed runs. The first is numpy's argsort of Philox words, rewritten here.
    words = np.random.Philox(np.random.SeedSequence([1, 0])).random_raw(8).tolist()
    assert EpochOrder(8, (1,)).rows(np.arange(8), 0).tolist() == sorted(range(8), key=words.__getitem__)
    assert EpochOrder(8, (1,)).rows(np.arange(8), 0).tolist() == [2, 0, 1, 4, 5, 6, 7, 3]
    monkeypatch.setattr(order_module, "SORTED_UP_TO", 0)
    assert EpochOrder(17, (1,)).rows(np.arange(8), 0).tolist() == [3, 16, 14, 11, 9, 7, 4, 0]


def test_a_billion_rows_are_looked_up_without_being_listed():
    rows = EpochOrder(10**9, (1,)).rows(np.arange(10**6, 10**6 + 4096), 2)
    assert len(set(rows.tolist())) == 4096 and 0 <= rows.min() and rows.max() < 10**9
    # Spread evenly: eight bins of 512 ± 5 standard deviations of 21.
    assert np.abs(np.bincount(rows // 125_000_000, minlength=8) - 512).max() < 106


def test_the_cipher_leaves_no_trace_of_the_order(monkeypatch):
    monkeypatch.setattr(order_module, "SORTED_UP_TO", 0)
    rows = EpochOrder(20_000, (5,)).rows(np.arange(20_000), 0)
    # Correlations of independent numbers are below 5 / sqrt(20000) = 0.035.
    for other in (np.arange(19_999), rows[:-1]):
        assert abs(np.corrcoef(rows[1:], other)[0, 1]) < 0.035


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(lambda weights: sum(weights) > 0.1),
    st.integers(0, 40_000),
    st.integers(0, 300),
)
def test_draws_keep_to_the_weights_and_are_counted_without_counting(weights, begin, count):
    draws = Draws(weights)
    source, own = draws.draw(0, begin + count)
    assert draws.counts(begin + count).tolist() == np.bincount(source, minlength=len(weights)).tolist()
    for s in range(len(weights)):
        assert own[source == s].tolist() == list(range((source == s).sum()))
    later = draws.draw(begin, count)
    assert later[0].tolist() == source[begin:].tolist() and later[1].tolist() == own[begin:].tolist()
    # Turns are spread evenly: never more than a turn a source away from its share, besides the shares' rounding.
    rounding = (begin + count) * len(weights) / Draws.PERIOD
    shares = np.array(weights) / sum(weights)
    assert np.abs(draws.counts(begin + count) - shares * (begin + count)).max() <= len(weights) + rounding


def test_new_weights_go_on_from_what_was_read():
    first = Draws([1, 1])
    second = Draws([3, 1], begin=100, read=first.counts(100).tolist())
    assert first.counts(100).tolist() == [50, 50] and second.counts(500).tolist() == [350, 150]
    source, own = second.draw(100, 4)
    assert sorted(own[source == 0].tolist()) == [50, 51, 52] and own[source == 1].tolist() == [50]
    with pytest.raises(AssertionError, match="no longer known"):
        second.counts(99)


def test_a_small_weight_is_small_and_a_zero_is_nothing():
    counts = Draws([1e-9, 1.0, 0.0]).counts(Draws.PERIOD)
    assert counts.tolist() == [1, Draws.PERIOD - 1, 0]


def test_the_formula_by_hand():
    # α = w · exp(max(ℓ − ref, 0)): 0.5·e^0.2, 0.3·e^0, 0.2·e^1.0; e^0.2 = 1.221403, e = 2.718282.
    alpha = [0.5 * 1.221403, 0.3, 0.2 * 2.718282]
    wanted = [value / sum(alpha) for value in alpha]
    assert updated_weights((0.5, 0.3, 0.2), [2.2, 1.0, 4.0], [2.0, 1.5, 3.0]) == pytest.approx(wanted, rel=1e-6)


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 900), st.floats(0, 900)), min_size=1, max_size=6),
)
def test_equals_the_paper_and_never_overflows(sources):
    weights, losses, references = (list(column) for column in zip(*sources, strict=True))
    got = updated_weights(weights, losses, references)
    assert sum(got) == pytest.approx(1.0) and all(0 <= weight <= 1 for weight in got)
    with np.errstate(over="ignore", invalid="ignore"):
        alpha = np.array(weights, np.longdouble) * np.exp(np.maximum(np.array(losses, np.longdouble) - references, 0))
    np.testing.assert_allclose(got, np.asarray(alpha / alpha.sum(), float), rtol=1e-9, atol=1e-300)


def test_sources_that_have_reached_their_references_keep_their_shares():
    assert updated_weights((0.7, 0.3), [1.0, 2.0], [1.5, 2.0]) == pytest.approx((0.7, 0.3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_changes_nothing(bad):
    assert updated_weights((0.7, 0.3), [1.0, bad], [1.5, 2.0]) == (0.7, 0.3)
