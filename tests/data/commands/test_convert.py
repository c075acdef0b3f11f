"""Version 1, version 2 and JSON lines into each other, without loss."""

from __future__ import annotations

import json

import pytest

import cook.data.commands.common as common
from cook.base.errors import UserError
from tests.data.commands.conftest import BLOCK
from tests.data.cpm_live import reference


def test_all_the_way_round(live, run, tmp_path):
    folder, records = live
    run("convert", folder, "--output", tmp_path / "two", "--version", 2, "--block-size", BLOCK)
    run("convert", tmp_path / "two", "--output", tmp_path / "x.jsonl")
    run("convert", tmp_path / "x.jsonl", "--output", tmp_path / "one", "--block-size", BLOCK)
    assert reference.read_folder(tmp_path / "two", BLOCK) == reference.read_folder(tmp_path / "one", BLOCK) == records
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    heads = [[line["task"], len(line["segments"]), *(v for s in line["segments"] for v in s)] for line in lines]
    assert [head + line["tokens"] for head, line in zip(heads, lines, strict=True)] == records


def test_many_records_become_several_files(live, run, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "FILE_BYTES", 20_000)
    folder, records = live
    run("convert", folder, "--output", tmp_path / "out", "--block-size", BLOCK)
    assert len(list((tmp_path / "out").iterdir())) > 4
    assert reference.read_folder(tmp_path / "out", BLOCK) == records


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("[]", "not a JSON object"),
        ("{}", "no key 'task'"),
        ('{"task": 1, "segments": [[1, 1, 0]]}', "no key 'tokens'"),
        ('{"task": 1, "segments": [[1, 1]], "tokens": [5]}', "not \\[length, type, task\\]"),
        ('{"task": 1, "segments": [[2, 1, 0]], "tokens": [5]}', "have 2 tokens, the record 1"),
        ('{"task": 1, "segments": [[1, 1, 0]], "tokens": [5.5]}', "integers"),
        ('{"task": 1, "segments": [[1, 1, 0]], "tokens": [true]}', "integers"),
        ('{"task": 1, "segments": [[1, 1, 0]], "tokens": [99999999999999999999]}', "no record"),
        ('{"task": 1, "segments": 3, "tokens": [5]}', "no record"),
    ],
)
def test_lines_that_are_no_records(run, tmp_path, line, word):
    (tmp_path / "x.jsonl").write_text('{"task": 1, "segments": [[1, 1, 0]], "tokens": [5]}\n' + line)
    with pytest.raises(UserError, match=f"x.jsonl, line 2: .*{word}"):
        run("convert", tmp_path / "x.jsonl", "--output", tmp_path / "out")


def test_missing_and_existing_files(live, run, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        run("convert", tmp_path / "gone.jsonl", "--output", tmp_path / "out")
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(UserError, match="there already"):
        run("convert", live[0], "--output", tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="no records to write"):
        run("convert", tmp_path / "x.jsonl", "--output", tmp_path / "out")
