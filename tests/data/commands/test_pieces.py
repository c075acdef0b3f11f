"""Lines dealt out in parts, and the documents in them."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.data.commands import pieces
from cook.data.commands.pieces import (
    COUNTS,
    EMPTY,
    RESTS,
    UNKNOWN,
    Settings,
    documents,
    format_of,
    input_files,
    lines,
    parts_of,
    records_of,
)
from cook.data.reports import LeftOut
from tests.data.cpm_tasks.letters import Letters


def parts_in(path, part_size):
    return parts_of([(path, path.name)], part_size)


@given(content=st.lists(st.text("ab\né", max_size=12), max_size=12), part_size=st.integers(1, 40))
def test_every_line_is_in_exactly_one_part(tmp_path_factory, content, part_size):
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_text("x\n" + "".join(content), encoding="utf-8")
    found = [line for part in parts_in(path, part_size) for line in lines(part)]
    assert b"".join(line for _, line in found) == path.read_bytes()
    assert [line for _, line in found] == path.read_bytes().splitlines(keepends=True)
    assert all(path.read_bytes()[offset:].startswith(line) for offset, line in found)
    text = [doc for part in parts_in(path, part_size) for doc in documents(part, "text", "text")]
    assert "".join(text) == path.read_bytes().decode()


def test_documents_of_every_format(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_bytes("one<n>two  \r\n\n  三\n".encode())
    part = parts_in(tmp_path / "x.txt", 1000)[0]
    assert list(documents(part, "lines", "text")) == ["one\ntwo", "三"]
    monkeypatch.setattr(pieces, "PART_BYTES", 5)
    assert list(documents(part, "text", "text")) == ["one<n>two  \r\n", "\n  三\n"]
    (tmp_path / "y.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in ("a<n>b", "c\nd")))
    assert list(documents(parts_in(tmp_path / "y.jsonl", 1000)[0], "jsonl", "body")) == ["a<n>b", "c\nd"]


def test_the_format_follows_from_the_names(tmp_path):
    assert format_of(["a.jsonl", "b.json"]) == "jsonl" and format_of(["a.jsonl", "b.txt"]) == "lines"
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text("x")
    named = input_files([str(tmp_path / "b.txt"), str(tmp_path)], "lines", LeftOut())
    assert [name for _, name in named] == ["b.txt", "a.txt", "c.jsonl"]
    assert [name for _, name in input_files([str(tmp_path)], "jsonl", LeftOut())] == ["c.jsonl"]


@pytest.mark.parametrize("format", ["lines", "text", "jsonl"])
def test_text_that_is_none_is_named_with_its_offset(tmp_path, format):
    (tmp_path / "x").write_bytes(b'{"text": "good"}\n' * 10 + b'{"text": "\xff"}\n')
    with pytest.raises(UserError) as caught:
        for part in parts_in(tmp_path / "x", 40):
            list(documents(part, format, "text"))
    offset = 170 if format == "jsonl" else 180
    assert f"{tmp_path / 'x'}" in str(caught.value) and f"offset {offset}" in str(caught.value)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UserError, match="the input is empty"):
        parts_in(tmp_path / "empty", 40)


def test_unknown_tokens_are_left_out_before_the_text_is_cut(tmp_path):
    (tmp_path / "x.txt").write_text("ab" + "三" * 50 + "c" * 40 + "\n" + "三" * 90 + "\n")
    settings = Settings(
        format="lines",
        text_field="text",
        max_length=40,
        prompt_length=4,
        masked_share=0.0,
        seed=0,
        version=1,
        block_size=4096,
    )
    counts, left_out = dict.fromkeys(COUNTS, 0), LeftOut()
    (record,) = records_of(parts_in(tmp_path / "x.txt", 1000)[0], settings, Letters(), counts, left_out)
    assert record.tokens.tolist() == [6, ord("a"), ord("b"), *[ord("c")] * 32, 7]
    assert record.task == 2 and record.segments == ((36, 2, 1),)
    assert counts == {"documents": 2, "tokens": 34, "records": 0}
    assert {reason: told["count"] for reason, told in left_out.record().items()} == {UNKNOWN: 140, EMPTY: 1, RESTS: 8}


def test_a_compressed_file_is_one_part_with_the_lines_of_the_plain_one(tmp_path):
    content = "\ufeff" + "".join(f"line {n}\n" for n in range(50))
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    for format in ("lines", "text"):
        plain = [text for part in parts_in(tmp_path / "a.txt", 1 << 20) for text in documents(part, format, "text")]
        (part,) = parts_in(tmp_path / "a.txt.gz", 20)
        assert list(documents(part, format, "text")) == plain and plain[0].startswith("line 0")
