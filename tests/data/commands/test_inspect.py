"""What inspect says of a folder."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cook.base.errors import UserError
from tests.data.cpm_live import reference


def test_counts_lengths_and_samples(live, run):
    folder, records = live
    facts = json.loads(run("inspect", folder, "--json", "--samples", 4))
    lengths = [len(record) - 2 - 3 * record[1] for record in records]
    assert facts["records"] == 400 and facts["tokens"] == sum(lengths)
    wanted = {"min": min(lengths), "median": np.median(lengths), "mean": np.mean(lengths), "max": max(lengths)}
    assert facts["lengths"] == pytest.approx(wanted)
    assert sum(facts["histogram"]["counts"]) == 400
    tasks = [record[4 + 3 * s] for record in records for s in range(record[1])]
    assert facts["segment_tasks"] == {"masked LM": tasks.count(0), "LM": tasks.count(1)}
    assert {int(task): count for task, count in facts["prompts"].items()} == {
        task: sum(record[0] == task for record in records) for task in (1, 2, 3)
    }
    assert [sample["record"] for sample in facts["samples"]] == [0, 133, 266, 399]
    assert facts["samples"][1]["tokens"] == records[133][2 + 3 * records[133][1] :]
    assert [file["records"] for file in facts["files"]] == [150, 250]


def test_the_text_for_a_reader(live, run, tokenizer, tokenizer_path, tmp_path):
    folder, _ = live
    printed = run("inspect", folder)
    assert "records             400" in printed and "masked LM" in printed and "whole: every record was read" in printed
    ids = tokenizer.encode("the model reads a row")
    record = np.array([1, 1, len(ids), 1, 0, *ids])
    reference.write_folder(tmp_path / "text", {"x": [record]}, version=2, block_size=4096)
    assert "the model reads a row" in run("inspect", tmp_path / "text", "--tokenizer", tokenizer_path)
    with pytest.raises(UserError, match="outside of the tokenizer's vocabulary"):
        run("inspect", folder, "--tokenizer", tokenizer_path)


def test_damage_is_an_error(live, run):
    folder, _ = live
    content = bytearray((folder / "b").read_bytes())
    content[8192] = 9
    (folder / "b").write_bytes(content)
    with pytest.raises(UserError, match="b, block 1, offset 8192: the byte 0x09"):
        run("inspect", folder)


def test_an_empty_folder(tmp_path, run):
    reference.write_folder(tmp_path / "empty", {"x": []}, version=1, block_size=4096)
    assert json.loads(run("inspect", tmp_path / "empty", "--json"))["records"] == 0
    assert "records               0" in run("inspect", tmp_path / "empty")
