import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cook.report.human import human_count, human_duration


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (950, "950"),
        (999, "999"),
        (1000, "1.00k"),
        (12345.6, "12.3k"),
        (999_499, "999k"),
        (999_950, "1.00M"),
        (7_421_952, "7.42M"),
        (9_391_226_880, "9.39B"),
        (-1500, "-1.50k"),
        (3.14159, "3.14"),
        (0.5, "0.50"),
        (99.97, "100"),
        (999.7, "1.00k"),
        (2.5e15, "2500T"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_counts(value, text):
    assert human_count(value) == text


@given(st.integers(min_value=1000, max_value=10**14))
def test_a_count_is_within_half_a_percent_and_four_characters_of_digits(value):
    text = human_count(value)
    number = float(text[:-1]) * {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[text[-1]]
    assert abs(number - value) <= 0.0051 * value
    assert 1 <= float(text[:-1]) < 1000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (-3, "0:00"), (32.4, "0:32"), (59.6, "1:00"), (3599.6, "1:00:00"), (3723, "1:02:03")]
    + [(3 * 86400 + 4 * 3600 + 5 * 60 + 6, "3d 04:05:06"), (math.inf, "-:--"), (math.nan, "-:--")],
)
def test_durations(seconds, text):
    assert human_duration(seconds) == text
