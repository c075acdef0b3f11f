"""A record's numbers: written and read back, and what is wrong with invalid ones."""

from __future__ import annotations

import numpy as np
import pytest

from cook.data.cpm_live.records import BadRecord, Record, Segment, read_record


def test_there_and_back():
    record = Record(3, (Segment(2, 1, 0), Segment(3, 2, 1)), np.array([6, 7, 6, 9, 7]))
    assert record.numbers().tolist() == [3, 2, 2, 1, 0, 3, 2, 1, 6, 7, 6, 9, 7]
    again = read_record(record.numbers())
    assert (again.task, again.segments, again.tokens.tolist()) == (3, record.segments, [6, 7, 6, 9, 7])


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ([], "not a record"),
        ([1, 1, 0, 1], "not a record"),
        ([-1, 1, 1, 1, 0, 5], "-1 is not a task"),
        ([1, 0, 1, 1, 0, 5], "0 segments"),
        ([1, 2, 1, 1, 0, 5], "2 segments"),
        ([1, 2**62, 1, 1, 0, 5], "segments"),
        ([1, 1, 2, 1, 0, 5], "have 2 tokens, the record 1"),
        ([1, 2, 2, 1, 0, -1, 2, 1, 5], "length -1"),
        ([1, 1, 1, -1, 0, 5], "type -1"),
        ([1, 1, 1, 1, 7, 5], "task is 7"),
        ([1, 1, 1, 1, 0, -5], "-5 is negative"),
        ([1, 1, 1, 2, 101, 5], "at least two"),
        ([1, 2, 1, 2, 100, 1, 2, 100, 5, 5], "exactly one is right"),
        ([1, 2, 1, 2, 101, 1, 2, 0, 5, 5], "come alone"),
        ([1, 2, 0, 2, 100, 1, 2, 101, 5], "empty"),
    ],
)
def test_a_bad_record_is_refused(numbers, word):
    with pytest.raises(BadRecord, match=word):
        read_record(np.array(numbers, np.int64))
