import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cook.report.tables import (
    LadderRow,
    human_bytes,
    human_count,
    human_duration,
    ladder_table,
    markdown_table,
    plain_table,
    range_text,
)


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


def test_bytes_have_decimal_units():
    assert [human_bytes(n) for n in (999, 145e6, 1.424e9, 2.5e12)] == ["999B", "145MB", "1.42GB", "2.50TB"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (-3, "0:00"), (32.4, "0:32"), (59.6, "1:00"), (3599.6, "1:00:00"), (3723, "1:02:03")]
    + [(3 * 86400 + 4 * 3600 + 5 * 60 + 6, "3d 04:05:06"), (math.inf, "-:--"), (math.nan, "-:--")],
)
def test_durations(seconds, text):
    assert human_duration(seconds) == text


DENSE = LadderRow(
    model="dense",
    att_layers=8,
    ffn_layers=8,
    heads="16",
    dim_ff="700",
    parameters=7_421_952,
    held_out_loss=4.2126,
    tokens_per_second=12345.6,
)
SMALL = LadderRow(
    model="small",
    att_layers=6,
    ffn_layers=5,
    heads="2–6",
    dim_ff="350",
    parameters=941_000,
    held_out_loss=None,
    tokens_per_second=None,
)


def test_the_ladder_is_aligned_and_markdown():
    assert ladder_table([DENSE, SMALL]) == "\n".join(
        [
            "| model | att layers | ffn layers | heads | dim_ff | parameters | held-out loss | tokens/s |",
            "| ----- | ---------: | ---------: | ----: | -----: | ---------: | ------------: | -------: |",
            "| dense |          8 |          8 |    16 |    700 |      7.42M |         4.213 |    12.3k |",
            "| small |          6 |          5 |   2–6 |    350 |       941k |             – |        – |",
        ]
    )


def test_an_empty_ladder_is_its_header():
    assert len(ladder_table([]).splitlines()) == 2


def test_a_cell_cannot_break_the_table():
    text = markdown_table(["a", "b"], [["x|y", "1\n2"]])
    assert text.splitlines()[2] == "| x\\|y | 1 2 |"


def test_wide_characters_take_two_cells():
    assert plain_table(["name", "n"], [["小模型", "1"], ["ab", "22"]]).splitlines() == [
        "name      n",
        "------  ---",
        "小模型    1",
        "ab       22",
    ]


@pytest.mark.parametrize(("sizes", "text"), [([4, 4], "4"), ([2, 6, 4], "2–6"), ([], "–")])
def test_ranges(sizes, text):
    assert range_text(sizes) == text


def test_rows_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DENSE.heads = "3"
