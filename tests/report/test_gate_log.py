from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cook.base.errors import UserError
from cook.report import gate_log
from cook.report.gate_log import GateGroup, GateLog, read_gate_log

GROUPS = [
    GateGroup(name="layers.0.heads", layer=0, site="att", kind="heads", units=3),
    GateGroup(name="layers.0.dimff", layer=0, site="ffn", kind="dimff", units=2),
]
SIZE = 4 + 5


def written(folder: Path, steps: range) -> GateLog:
    log = GateLog(folder, GROUPS)
    log.rewind(-1)
    for step in steps:
        log.write(step, torch.full((5,), step / 10))
    return log


def steps(folder: Path) -> list[int]:
    return [step for step, _ in read_gate_log(folder)[1]]


def test_a_record_is_the_step_and_one_byte_per_unit(tmp_path):
    log = GateLog(tmp_path, GROUPS)
    log.rewind(-1)
    log.write(70000, torch.tensor([0.0, 0.5, 1.0, 1.2, -0.1]))
    assert (tmp_path / "gates.bin").read_bytes() == (70000).to_bytes(4, "little") + bytes([0, 128, 255, 255, 0])
    groups, records = read_gate_log(tmp_path)
    assert [(g["name"], g["kind"], g["units"]) for g in groups] == [
        ("layers.0.heads", "heads", 3),
        ("layers.0.dimff", "dimff", 2),
    ]
    assert records == [(70000, bytes([0, 128, 255, 255, 0]))]


def test_at_most_one_record_per_second_and_always_the_last(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(gate_log.time, "monotonic", lambda: now[0])
    log = written(tmp_path, range(0))
    due = []
    for step in range(1, 31):
        now[0] += 0.125
        if log.is_due(last=step == 30):
            log.write(step, torch.zeros(5))
            due.append(step)
    assert due == [1, 9, 17, 25, 30] == steps(tmp_path)


def test_the_interval_grows_with_the_file(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(gate_log.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gate_log, "DOUBLING", 2 * SIZE)
    log, times = written(tmp_path, range(0)), []
    for _ in range(64):
        now[0] += 0.5
        if log.is_due(last=False):
            log.write(len(times), torch.zeros(5))
            times.append(now[0] - 100)
    assert times == [0.5, 1.5, 3.5, 5.5, 9.5, 13.5, 21.5, 29.5]


@pytest.mark.parametrize(("step", "kept"), [(-1, []), (0, []), (3, [1, 2, 3]), (9, [1, 2, 3, 4, 5])])
def test_a_resumed_run_removes_later_records(tmp_path, step, kept):
    written(tmp_path, range(1, 6))
    before = (tmp_path / "gates.bin").stat()
    log = GateLog(tmp_path, GROUPS)
    log.rewind(step)
    assert steps(tmp_path) == kept
    if len(kept) < 5 and step >= 0:
        assert (tmp_path / "gates.bin").stat().st_ino != before.st_ino, "a program that follows the file must notice"
    log.write(7, torch.ones(5))
    assert steps(tmp_path) == [*kept, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gates.bin", "gates.json"]


def test_a_record_cut_short_by_a_kill_is_removed(tmp_path):
    written(tmp_path, range(1, 4))
    os.truncate(tmp_path / "gates.bin", 2 * SIZE + 5)
    assert steps(tmp_path) == [1, 2]
    log = GateLog(tmp_path, GROUPS)
    log.rewind(3)
    log.write(4, torch.ones(5))
    assert steps(tmp_path) == [1, 2, 4] and (tmp_path / "gates.bin").stat().st_size == 3 * SIZE


def test_the_log_of_other_groups_is_not_continued(tmp_path):
    written(tmp_path, range(1, 4))
    log = GateLog(tmp_path, GROUPS[:1])
    log.rewind(3)
    log.write(4, torch.ones(3))
    assert steps(tmp_path) == [4]


def test_a_full_disk_costs_records_and_not_the_run(tmp_path, monkeypatch, capsys):
    log = written(tmp_path, range(1, 3))
    real = gate_log.FileIO

    class Full(real):  # type: ignore[misc, valid-type]
        room = 3

        def write(self, content):
            if not Full.room:
                raise OSError(28, "No space left on device")
            count = super().write(memoryview(content)[: Full.room])
            Full.room -= count
            return count

    monkeypatch.setattr(gate_log, "FileIO", Full)
    log.write(3, torch.ones(5))
    log.write(4, torch.ones(5))
    assert steps(tmp_path) == [1, 2]
    assert capsys.readouterr().err.count("No space left on device") == 1
    Full.room = 1000
    log.write(5, torch.ones(5))
    assert steps(tmp_path) == [1, 2, 5] and (tmp_path / "gates.bin").stat().st_size == 3 * SIZE


def test_a_rewind_on_a_full_disk_cuts_the_file_in_place(tmp_path, monkeypatch):
    written(tmp_path, range(1, 4))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gate_log.shutil, "copyfile", full)
    GateLog(tmp_path, GROUPS).rewind(1)
    assert steps(tmp_path) == [1]
    monkeypatch.setattr(gate_log, "write_json", full)
    GateLog(tmp_path, GROUPS).rewind(-1)  # no error


def test_other_ranks_write_nothing(tmp_path):
    log = GateLog(tmp_path, GROUPS, enabled=False)
    log.rewind(-1)
    assert not log.is_due(last=True) and list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no such file"):
        read_gate_log(tmp_path)
