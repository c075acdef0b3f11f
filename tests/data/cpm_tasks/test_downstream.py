"""Downstream objects become the samples that CPM-Ant tunes on."""

from __future__ import annotations

import numpy as np
import pytest

from cook.base.errors import UserError
from cook.data.cpm_live.records import read_record
from cook.data.cpm_tasks.downstream import choice_token, record_of
from cook.data.reports import LeftOut
from tests.data.cpm_tasks.letters import Letters

PROMPT, ENDS = 4, [1 if ord(c) > 399 else ord(c) for c in "[是否正确]"]
ENDS[1] = 5


def tuned_on(value, max_length):
    """CPM-Live's `process_data` of an object: ids, context and targets, with the prompt of task 1."""
    ids = [6] + Letters().encode(value["input"])
    target = Letters().encode(value["target"]) + [7]
    if PROMPT + len(ids) + len(target) > max_length:
        ids = ids[-(max_length - PROMPT - len(target)) :]
    whole = [PROMPT + p for p in range(PROMPT)] + ids + target
    context = [True] * (PROMPT + len(ids)) + [False] * len(target)
    targets = [-100 if context[i + 1] else whole[i + 1] for i in range(len(whole) - 1)] + [-100]
    return whole, context, targets


def numbers(value, max_length=64, left_out=None):
    sizes = {"max_length": max_length, "prompt_length": PROMPT}
    return record_of(value, "f, line 3", Letters(), **sizes, left_out=left_out or LeftOut()).numbers()


@pytest.mark.parametrize("max_length", [64, 30, 14])
def test_an_input_and_its_target(make_rows, max_length):
    value = {"input": "the capital of France", "target": "Paris", "extra": 1}
    rows, _ = make_rows([numbers(value, max_length).tolist()], max_length=max_length, prompt_length=PROMPT)
    batch = rows.batch(np.array([0]))
    length = int(batch["length"][0])
    ids, context, targets = tuned_on(value, max_length)
    assert length == len(ids) <= max_length
    assert batch["input"][0, :length].tolist() == ids
    assert batch["context"][0, :length].tolist() == context
    assert batch["targets"][0, :length].tolist() == targets
    assert set(batch["segment"][0, PROMPT:length].tolist()) == {2}
    assert rows.num_targets(np.array([0])).tolist() == [6] == rows.num_targets(np.array([0]), 5).tolist()


def test_a_question_with_options(make_rows):
    value = {"input": "2+2", "options": ["3", "44", "4"], "target": 2}
    record = numbers(value, 63)
    assert [s.task for s in read_record(record).segments] == [100, 100, 101]
    rows, _ = make_rows([record.tolist()], max_length=63, prompt_length=PROMPT, choice_token=5)
    batch = rows.batch(np.array([0, 0]))
    assert choice_token(Letters()) == 5 == batch["choice_token"][0]
    expected = [
        [PROMPT + p for p in range(PROMPT)] + [6, *map(ord, "2+2" + option)] + ENDS for option in ("3", "44", "4")
    ]
    length = sum(map(len, expected))
    assert batch["input"][0, :length].tolist() == [id for sample in expected for id in sample]
    assert batch["context"][0, :length].all() and (batch["targets"] == -100).all()
    ends = np.cumsum([len(sample) for sample in expected]) - 1
    for choices in batch["choices"]:
        assert np.flatnonzero(choices >= 0).tolist() == ends.tolist()
        assert choices[ends].tolist() == [0, 0, 1]
    assert batch["span"][0, ends].tolist() == [0, 1, 2]
    assert rows.num_targets(np.array([0, 0])).tolist() == [1, 1]


def test_options_that_are_too_long_lose_their_beginning():
    record = read_record(numbers({"input": "x" * 90, "options": ["a", "b"], "target": 0}, 60))
    assert [segment.length for segment in record.segments] == [26, 26]
    assert record.tokens[:26].tolist() == [ord("x")] * 19 + [ord("a"), *ENDS]


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({}, "no key 'input'"),
        ({"input": 3, "target": "x"}, "'input' is not a string"),
        ({"input": "x"}, "no key 'target'"),
        ({"input": "x", "target": 1}, "'target' is not a string"),
        ({"input": "x", "target": "y" * 60}, "too long to leave any tokens"),
        ({"input": "x", "options": ["a"], "target": 0}, "not a list of texts"),
        ({"input": "x", "options": "ab", "target": 0}, "not a list of texts"),
        ({"input": "x", "options": ["a", 2], "target": 0}, "not a list of texts"),
        ({"input": "x", "options": ["a", "b"]}, "not the number of an option"),
        ({"input": "x", "options": ["a", "b"], "target": 2}, "0 to 1"),
        ({"input": "x", "options": ["a", "b"], "target": True}, "not the number of an option"),
        ({"input": "x", "options": ["a"] * 16, "target": 0}, "16 options do not fit"),
    ],
)
def test_bad_objects_are_named(value, word):
    with pytest.raises(UserError) as caught:
        numbers(value)
    assert str(caught.value).startswith("f, line 3: ") and word in str(caught.value)
