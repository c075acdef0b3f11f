"""Folders merged, shuffled and converted; no record is lost."""

from __future__ import annotations

import json

import numpy as np
import pytest

import cook.data.commands.common as common
from cook.base.errors import UserError
from tests.data.commands.conftest import BLOCK
from tests.data.cpm_live import reference


@pytest.mark.parametrize("version", [1, 2])
def test_folders_of_one_format_are_copied(live, run, tmp_path, version):
    folder, records = live
    more = reference.random_records(np.random.default_rng(1), 30)
    reference.write_folder(tmp_path / "more", {"a": more}, version=version, block_size=BLOCK)
    if version == 2:
        run("convert", folder, "--output", tmp_path / "two", "--version", 2, "--block-size", BLOCK)
        folder = tmp_path / "two"
    assert "copied" in run("merge", folder, tmp_path / "more", tmp_path / "more", "--output", tmp_path / "all")
    again = [record.tolist() for record in more]
    assert reference.read_folder(tmp_path / "all", BLOCK) == records + again + again
    assert "records             460" in run("inspect", tmp_path / "all")
    assert len(list((tmp_path / "all").iterdir())) == (5 if version == 1 else 4)


def test_other_formats_are_written_anew(live, run, tmp_path):
    folder, records = live
    more = reference.random_records(np.random.default_rng(1), 30)
    reference.write_folder(tmp_path / "more", {"a": more}, version=2, block_size=4096)
    assert "written anew in version 1" in run("merge", folder, tmp_path / "more", "--output", tmp_path / "all")
    assert reference.read_folder(tmp_path / "all", BLOCK) == records + [record.tolist() for record in more]
    run("merge", folder, "--output", tmp_path / "two", "--version", 2)
    assert (tmp_path / "two" / "meta.bin").read_bytes()[:1] == b"{"
    with pytest.raises(UserError, match="is not empty"):
        run("merge", folder, "--output", tmp_path / "two")


def test_the_same_records_in_an_order_of_the_seed(live, run, tmp_path):
    folder, records = live
    for name, options in {"a": [], "b": ["--memory", "20K"], "c": ["--seed", 1]}.items():
        run("shuffle", folder, "--output", tmp_path / name, *options)
    a, b, c = (reference.read_folder(tmp_path / name, BLOCK) for name in "abc")
    assert a == b and a != c and a != records, "the memory does not change the order, the seed does"
    assert sorted(a) == sorted(c) == sorted(records)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["data-00000", "meta.bin"]
    place = {tuple(record): index for index, record in enumerate(records)}
    order = np.array([place[tuple(record)] for record in a])
    # Of 400 records in random order neighbours stay together once on average.
    assert (np.abs(np.diff(order)) == 1).sum() < 10 and abs(np.corrcoef(order, np.arange(400))[0, 1]) < 0.2


def test_version_2_stays_version_2(live, run, tmp_path):
    folder, records = live
    run("convert", folder, "--output", tmp_path / "two", "--version", 2, "--block-size", BLOCK)
    run("shuffle", tmp_path / "two", "--output", tmp_path / "shuffled")
    assert (tmp_path / "shuffled" / "meta.bin").read_bytes()[:1] == b"{"
    assert sorted(reference.read_folder(tmp_path / "shuffled", BLOCK)) == sorted(records)


def test_too_little_memory_and_damage(live, run, tmp_path):
    folder, _ = live
    with pytest.raises(UserError, match="--memory is too small"):
        run("shuffle", folder, "--output", tmp_path / "a", "--memory", "16")
    content = bytearray((folder / "b").read_bytes())
    content[0] = 9
    (folder / "b").write_bytes(content)
    with pytest.raises(UserError, match="block 0, offset 0"):
        run("shuffle", folder, "--output", tmp_path / "a")
    assert not list((tmp_path / "a").iterdir()), "nothing is left behind"


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
    with pytest.raises(UserError, match="already exists"):
        run("convert", live[0], "--output", tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="no records to write"):
        run("convert", tmp_path / "x.jsonl", "--output", tmp_path / "out")
