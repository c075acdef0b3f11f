import pytest
from hypothesis import given
from hypothesis import strategies as st

from cook.report.drawing import numbers_of, smooth, spread


def test_smoothing_keeps_a_constant_and_a_slope_and_calms_noise():
    assert smooth([3.0] * 200) == pytest.approx([3.0] * 200)
    slope = [float(i) for i in range(600)]
    assert smooth(slope)[10:-10] == pytest.approx(slope[10:-10])  # no lag
    zigzag = smooth([(-1.0) ** i for i in range(600)])
    assert max(map(abs, zigzag[10:-10])) < 0.06
    assert smooth([]) == [] and smooth([2.0]) == [2.0]


@given(st.lists(st.floats(0, 1), max_size=30).map(sorted))
def test_spread_labels_keep_order_distance_and_range(wanted):
    places = spread(wanted, 0.04, 0.0, 0.97)
    assert len(places) == len(wanted)
    gap = min(0.04, 0.97 / max(1, len(wanted) - 1))
    assert all(right - left >= gap - 1e-9 for left, right in zip(places, places[1:], strict=False))
    assert all(-1e-9 <= place <= 0.97 + 1e-9 for place in places)


def test_labels_with_room_stay_where_they_want_to_be():
    assert spread([0.1, 0.5, 0.9], 0.04, 0, 1) == [0.1, 0.5, 0.9]


def test_numbers_need_both_values():
    records = [{"step": 1, "loss": None}, {"step": 2}, {"step": 3, "loss": 1}]
    assert numbers_of(records, "step", "loss") == ([3.0], [1.0])
