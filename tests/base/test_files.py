from __future__ import annotations

import hashlib
import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cook.base import files
from cook.base.errors import UserError
from cook.base.files import read_json, regular_file, sha256, write_atomically, write_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), children, max_size=3)
    ),
    max_leaves=10,
)


@given(JSON)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, value)
    assert read_json(path) == value == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' appears twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": ' + "9" * 5000 + "}", "not a usable number"),
        ('{"a": 1,\n "b": }', "line 2 column 7"),
        ('{"a": 1} {}', "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "too deeply"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    ],
)
def test_bad_json_is_refused_by_name(tmp_path, text, word):
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="bad.json") as caught:
        read_json(path)
    assert word in str(caught.value)


def test_an_object_of_many_keys_is_read_quickly(tmp_path):
    # Counting each key among all of them would take minutes.
    path = tmp_path / "index.json"
    path.write_text(json.dumps({str(i): i for i in range(100_000)}))
    assert len(read_json(path)) == 100_000


def test_missing_files_and_folders_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)


def test_what_is_no_ordinary_file_is_refused_without_reading(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, word in (
        (tmp_path / "pipe", "a pipe"),
        (tmp_path / "link", "a pipe"),
        (tmp_path / "socket", "a socket"),
        (tmp_path, "a folder"),
        ("/dev/zero", "a device"),
        (tmp_path / "loop", "symbolic links"),
        ("a\0b", "null"),
    ):
        with pytest.raises(UserError, match=word):
            read_json(path)
        with pytest.raises(UserError, match=word):
            regular_file(path, "mask file")


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("content")

    def refuse(path, _mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "open", refuse, raising=False)  # root may read any file
    with pytest.raises(UserError, match="a: cannot be read: Permission denied"):
        regular_file(tmp_path / "a")


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.txt"
    write_atomically(path, "old")

    def fail(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_what_a_killed_write_has_left_goes_with_the_next(tmp_path):
    (tmp_path / ".a.tmp").write_bytes(b"half of a longer content")
    write_atomically(tmp_path / "a", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"whole"


def test_content_is_flushed_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_atomically(tmp_path / "a", b"\x00\x01")
    assert events == ["fsync", "rename", "fsync"] and (tmp_path / "a").read_bytes() == b"\x00\x01"


def test_sha256(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_byte_order_mark_is_no_part_of_json_and_a_pipe_is_refused_at_once(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            read_json(path)
