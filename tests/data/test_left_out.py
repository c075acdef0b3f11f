"""Counts of what is left out."""

import json

from cook.data.left_out import LeftOut


def test_reasons_are_counted_and_the_first_names_are_kept():
    found = LeftOut()
    assert not found and found.sentences("x") == [] and found.count("files") == 0
    found.add("files", 0, "none")
    assert not found
    for name in "abcdefg":
        found.add("files", 1, name)
    found.add("tokens", 12345)
    assert found.sentences("data") == ["data: left out: files: 7 (a, b, c, d, e, …)", "data: left out: tokens: 12,345"]
    assert str(found) == "files: 7 (a, b, c, d, e, …); tokens: 12,345" and found.count("files") == 7


def test_a_record_is_json_and_adds_up():
    found = LeftOut()
    found.add("files", 2, "a", "b")
    record = json.loads(json.dumps(found.record()))
    again = LeftOut(record)
    again.include(record)
    again.add("files", 1, "c")
    assert again.record() == {"files": {"count": 5, "named": ["a", "b", "a", "b", "c"]}}
    assert found.record() == {"files": {"count": 2, "named": ["a", "b"]}}
