import dataclasses

import pytest

from cook.report.tables import LadderRow, ladder_table, markdown_table, plain_table, range_text

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
