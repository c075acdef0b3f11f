"""Task rows of a run: from binary folders or from JSON lines, prepared once, split, checked against the model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

import cook.data.cpm_tasks.task_data as load
from cook.base.errors import UserError
from cook.data.cpm_tasks.task_data import open_task_rows, split_records
from cook.data.token_loss import count_targets
from tests.data.cpm_live import reference
from tests.data.cpm_tasks.letters import Letters


def section(**values):
    return SimpleNamespace(**{"held_out": 0.1, "held_out_paths": (), "max_length": 80, **values})


@pytest.fixture
def folder(tmp_path):
    records = reference.random_records(np.random.default_rng(0), 300, vocab=400)
    reference.write_folder(tmp_path / "live", {"a": records[:100], "b": records[100:]}, version=1, block_size=4096)
    return tmp_path / "live"


def opened(tmp_path, data, **options):
    return open_task_rows(data, Letters(), prompt_length=4, cache=tmp_path / "cache", seed=0, **options)


def test_binary_data_is_split_packed_and_kept(tmp_path, folder, monkeypatch):
    train, held_out, files, _ = opened(tmp_path, section(type="cpm_live", paths=(str(folder),)))
    assert {name: size for name, (size, _) in files.items()} == {
        str(folder / name): (folder / name).stat().st_size for name in "ab"
    }
    parts = [rows.records(np.arange(len(rows)))[0] for rows in (train, held_out)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(300)) and 10 < len(parts[1]) < 60
    assert train.fingerprint == held_out.fingerprint
    monkeypatch.setattr(load, "pack_records", lambda *_, **__: pytest.fail("packed again"))
    again, *_ = opened(tmp_path, section(type="cpm_live", paths=(str(tmp_path / "li*"),)), build=False)
    assert again.fingerprint == train.fingerprint and len(again) == len(train)


def test_nothing_is_prepared_where_only_reading_is_asked_for(tmp_path, folder):
    with pytest.raises(UserError, match="nothing is prepared"):
        opened(tmp_path, section(type="cpm_live", paths=(str(folder),)), build=False)


def test_a_separate_folder_to_evaluate_on(tmp_path, folder):
    other = reference.random_records(np.random.default_rng(1), 20, vocab=400)
    reference.write_folder(tmp_path / "other", {"a": other}, version=2, block_size=4096)
    data = section(type="cpm_live", paths=(str(folder),), held_out_paths=(str(tmp_path / "other"),), held_out=0)
    train, held_out, *_ = opened(tmp_path, data)
    assert len(train.records(np.arange(len(train)))[0]) == 300
    assert len(held_out.records(np.arange(len(held_out)))[0]) == 20


def test_downstream_lines(tmp_path):
    objects = [{"input": f"{a}+{b}=", "target": str(a + b)} for a in range(10) for b in range(10)]
    objects += [{"input": "?", "options": ["a", "b"], "target": n % 2} for n in range(10)]
    (tmp_path / "x.jsonl").write_text("\n\n".join(map(json.dumps, objects)))
    train, held_out, *_ = opened(tmp_path, section(type="downstream", paths=(str(tmp_path / "x.jsonl"),)))
    batch = train.batch(np.arange(len(train)))
    assert train.num_targets(np.arange(len(train))).sum() == count_targets(batch) > 0
    assert sum(len(rows.records(np.arange(len(rows)))[0]) for rows in (train, held_out)) == 110
    (tmp_path / "x.jsonl").write_text('{"input": "x", "target": "y"}\n{"input": "x"}')
    with pytest.raises(UserError, match="x.jsonl, line 2: the object has no key 'target'"):
        opened(tmp_path, section(type="downstream", paths=(str(tmp_path / "x.jsonl"),)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("tokens", 400), ["token outside the vocabulary", "below 400", "got:    400"]),
        (("task", 9), ["a task that the model does not have", "below 4 (the model's prompt_types)"]),
        (("type", 5), ["a segment type that the model does not have", "below 3 (the model's segment_types)"]),
    ],
)
def test_what_the_model_does_not_know_is_named_before_the_first_step(tmp_path, change, words):
    records = reference.random_records(np.random.default_rng(0), 30, vocab=400)
    which, value = change
    records[20][{"tokens": -1, "task": 0, "type": 3}[which]] = value
    reference.write_folder(tmp_path / "live", {"a": records}, version=1, block_size=4096)
    data = section(type="cpm_live", paths=(str(tmp_path / "live"),))
    with pytest.raises(UserError) as caught:
        opened(tmp_path, data, limits={"prompt_types": 4, "segment_types": 3})
    assert all(word in str(caught.value) for word in [*words, "a, block 2, offset"]), str(caught.value)


def test_an_empty_folder(tmp_path):
    reference.write_folder(tmp_path / "live", {"a": []}, version=1, block_size=4096)
    with pytest.raises(UserError, match="no records"):
        opened(tmp_path, section(type="cpm_live", paths=(str(tmp_path / "live"),)))
    with pytest.raises(UserError, match="matches no folder"):
        opened(tmp_path, section(type="cpm_live", paths=(str(tmp_path / "no*"),)))


def test_which_records_are_held_out_depends_on_their_number_alone():
    many = split_records(100_000, 0.03)
    assert abs(many.mean() - 0.03) < 0.012  # 1563 runs of 64: a deviation of 0.0043
    assert np.array_equal(split_records(90_000, 0.03), many[:90_000])
    assert len(np.unique(np.flatnonzero(np.diff(many.astype(int))) % 64)) == 1, "whole runs"
    assert split_records(2, 0.0001).sum() == 1 and split_records(3, 0.9999).sum() == 2
    for fraction, count in ((0.0, 10), (1.0, 10), (0.5, 1)):
        with pytest.raises(UserError):
            split_records(count, fraction)
