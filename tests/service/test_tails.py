"""Growing files of a job: they are read from where the last reading ended, and replaced files are noticed."""

from __future__ import annotations

import base64
import json
import os
import struct

import pytest

from cook.report.events import EventLog
from cook.service.below import open_below, read_below
from cook.service.tails import Mark, open_gates, read_records, read_text

LOG = "run/out/pretrain/log.jsonl"


@pytest.fixture
def job(tmp_path):
    (tmp_path / "run" / "out" / "pretrain").mkdir(parents=True)
    return tmp_path


def test_text_is_read_by_byte_offset_and_characters_stay_whole(job):
    path = job / "run" / "x"
    assert read_text(job, "run/x", 0).text == ""
    path.write_bytes("aé€😀".encode() + b"\xf0\x9f")
    pieces, offset = [], 0
    while text := (piece := read_text(job, "run/x", offset, 4)).text:
        pieces.append(text)
        offset = piece.next
    assert "".join(pieces) == "aé€😀" and offset == 10
    path.write_bytes(path.read_bytes()[:-2] + "😀".encode())
    assert read_text(job, "run/x", offset).text == "😀"
    assert read_text(job, "run/x", 10**9).next == path.stat().st_size
    assert read_text(job, "run/x", -4).text == "😀" and read_text(job, "run/x", -(10**9)).offset == 0
    path.write_bytes(b"\xff\xfe" * 10)
    assert "\ufffd" in read_text(job, "run/x", 0).text


def test_records_grow_and_a_rewound_log_is_read_again(job):
    log = EventLog(job / "run" / "out" / "pretrain", tensorboard=False)
    assert read_records(job, LOG, None).records == []
    for step in range(5):
        log.write({"step": step, "loss": float(step)})
    first = read_records(job, LOG, None)
    assert first.reset and [record["step"] for record in first.records] == [0, 1, 2, 3, 4]
    nothing = read_records(job, LOG, first.mark)
    assert not nothing.reset and nothing.records == [] and nothing.mark == first.mark
    log.write({"step": 5, "loss": 1.0})
    grown = read_records(job, LOG, first.mark)
    assert not grown.reset and [record["step"] for record in grown.records] == [5]
    log.rewind(2)
    for step in range(3, 9):
        log.write({"step": step, "loss": -1.0})
    again = read_records(job, LOG, grown.mark)
    assert again.reset and [record["step"] for record in again.records] == list(range(9))
    log.close()
    (job / LOG).unlink()
    gone = read_records(job, LOG, again.mark)
    assert gone.reset and gone.mark is None


def test_a_file_that_was_replaced_is_noticed_also_with_the_same_inode_number_and_size(job):
    (job / LOG).write_text('{"step": 1, "loss": 1}\n')
    mark = read_records(job, LOG, None).mark
    (job / LOG).write_text('{"step": 1, "loss": 2}\n')
    found = read_records(job, LOG, mark)
    assert found.reset and found.records == [{"step": 1, "loss": 2}]


def test_incomplete_and_broken_lines(job):
    (job / LOG).write_bytes(b'{"step": 1}\n[1]\nnull\nnot json\n{"step": 2, "x": NaN}\n{"step": 3')
    found = read_records(job, LOG, None)
    assert found.records == [{"step": 1}, {"step": 2, "x": None}]
    (job / LOG).write_bytes((job / LOG).read_bytes() + b"}\n")
    assert read_records(job, LOG, found.mark).records == [{"step": 3}]


def test_a_long_log_comes_in_pieces(job):
    (job / LOG).write_text("".join(f'{{"step": {step}}}\n' for step in range(1000)))
    steps, mark, more, pieces = [], None, True, 0
    while more:
        found = read_records(job, LOG, mark, limit=2000)
        steps += [record["step"] for record in found.records]
        mark, more, pieces = found.mark, found.more, pieces + 1
    assert steps == list(range(1000)) and pieces > 4


@pytest.mark.parametrize("value", [None, 3, [], [1, 2], [1, "2", "x"], [1, -2, "x"], [True, 1, "x"], {"a": 1}])
def test_a_mark_of_another_shape_is_none(value):
    assert Mark.from_json(value) is None
    assert Mark.from_json([1, 2, "x"]) == Mark(inode=1, offset=2, check="x")


def write_gates(job, steps):
    folder = job / "run" / "out" / "pretrain"
    groups = [
        {"name": "a", "layer": 0, "kind": "heads", "units": 2},
        {"name": "b", "layer": 0, "kind": "dimff", "units": 1},
    ]
    (folder / "gates.json").write_text(json.dumps({"groups": groups}))
    (folder / "gates.bin").write_bytes(
        b"".join(struct.pack("<I3B", step, step % 256, 1, 2) for step in steps) + b"\0\0"
    )


def test_gate_records(job):
    assert open_gates(job, "pretrain") is None
    write_gates(job, range(0, 1000, 10))
    gates = open_gates(job, "pretrain")
    assert gates is not None and gates.units == 3
    every = gates.records()
    assert [record["step"] for record in every] == list(range(0, 1000, 10))
    assert base64.b64decode(every[7]["values"]) == bytes([70, 1, 2])
    assert [record["step"] for record in gates.records(after=970)] == [980, 990]
    assert gates.records(after=990) == [] and gates.records(after=-1) == every
    few = [record["step"] for record in gates.records(points=5)]
    assert len(few) == 5 and few[0] == 0 and few[-1] == 990
    assert [record["step"] for record in gates.records(points=1)] == [990]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"groups": []}', '{"groups": [{"units": 0}]}', '{"groups": [1]}'])
def test_gate_logs_of_another_shape_are_none(job, content):
    write_gates(job, [1])
    (job / "run" / "out" / "pretrain" / "gates.json").write_text(content)
    assert open_gates(job, "pretrain") is None


def test_only_regular_files_inside_are_opened(job, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret").write_text("secret")
    run = job / "run"
    (run / "file").write_text("content")
    (run / "link").symlink_to(outside / "secret")
    (run / "inner").symlink_to(run / "file")
    (run / "folder").symlink_to(outside)
    os.mkfifo(run / "pipe")
    assert read_below(job, "run/file") == b"content" and read_below(job, "run/file", 3) == b"con"
    bad = [
        "run/link",
        "run/inner",
        "run/folder/secret",
        "run/pipe",
        "run",
        "run/../run/file",
        "/etc/passwd",
        "",
        "run//file",
    ]
    for path in [*bad, "run/file/", "run/./file", "run/a\0b", "run/none", f"run/{'x' * 5000}", "run/\ud800"]:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(FileNotFoundError):
            open_below(job, path)
        assert len(os.listdir("/proc/self/fd")) == before
