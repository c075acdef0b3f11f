"""meta.bin: both versions, and what is wrong with a damaged one."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from cook.base.errors import UserError
from cook.data.cpm_live.meta import DEFAULT_BLOCK_SIZE, read_meta
from tests.data.cpm_live import reference

KEYS = ("file_name", "block_begin", "block_end", "nbytes", "nlines", "mask")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    files = {"a": reference.random_records(rng, 5), "b": reference.random_records(rng, 30)}
    reference.write_folder(tmp_path / "live", files, version=1, block_size=2000)
    return tmp_path / "live"


def rewrite(folder, version, change):
    states = reference.loads_files((folder / "meta.bin").read_bytes())
    states = change([list(state) for state in states])
    if version == 1:
        content = reference.dumps_files([tuple(state) for state in states])
    else:
        lines = [json.dumps({**dict(zip(KEYS, state, strict=True)), "block_size": 2000}) for state in states]
        content = "\n".join(lines).encode()
    (folder / "meta.bin").write_bytes(content)


def changed(index, key, value):
    def change(states):
        states[index][KEYS.index(key)] = value
        return states

    return change


def test_the_block_size_of_version_1_follows_from_the_files(folder):
    meta = read_meta(folder)
    assert [file.block_size for file in meta.files] == [2000, 2000] and meta.version == 1


@pytest.mark.parametrize("version", [1, 2])
def test_a_masked_file_need_not_exist(folder, version):
    rewrite(folder, version, changed(0, "mask", True))
    (folder / "a").unlink()
    meta = read_meta(folder)
    assert [file.file_name for file in meta.shown] == ["b"] and meta.version == version


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(0, "file_name", "../a"), ["entry 0", "outside of the folder"]),
        (changed(1, "file_name", "/etc/passwd"), ["entry 1", "outside of the folder"]),
        (changed(0, "file_name", ""), ["outside of the folder"]),
        (changed(0, "block_begin", 1), ["entry 0", "impossible blocks", "from 0 on"]),
        (changed(1, "block_begin", 5), ["entry 1 (b)", "impossible blocks"]),
        (changed(1, "block_end", 1), ["entry 1 (b)", "impossible blocks"]),
        (changed(1, "nlines", -1), ["negative count"]),
        (changed(1, "file_name", "c"), ["c: cannot be read", "put back the file"]),
        (changed(1, "block_end", 999), ["is not whole"]),
        (lambda states: [], ["empty"]),
    ],
)
def test_what_is_wrong_is_named(folder, version, change, words):
    rewrite(folder, version, change)
    with pytest.raises(UserError) as caught:
        read_meta(folder)
    assert all(word in str(caught.value) for word in words if version == 1 or word != "empty"), str(caught.value)


@pytest.mark.parametrize("cut", [1, 1999, 2000, 2001])
def test_a_truncated_file_is_named_with_block_and_offset(folder, cut):
    content = (folder / "b").read_bytes()
    (folder / "b").write_bytes(content[:-cut])
    rewrite(folder, 2, lambda states: states)
    with pytest.raises(UserError) as caught:
        read_meta(folder)
    left = len(content) - cut
    assert f"{folder / 'b'}: truncated" in str(caught.value)
    assert f"block {left // 2000} is not whole, offset {left}" in str(caught.value)


def test_version_1_falls_back_on_the_usual_block_size(folder):
    (folder / "b").write_bytes((folder / "b").read_bytes()[:-7])
    with pytest.raises(UserError, match=f"of {DEFAULT_BLOCK_SIZE} bytes"):
        read_meta(folder)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "an empty file"),
        (b"PK\x03\x04", "neither version 1"),
        (b"\x80\x04K\x01.", "not the list of files"),
        (b"\x80", "not the list of files"),
        (b"{", "line 1"),
        (b"{}", "no 'file_name'"),
        (b'{"file_name": 1, "block_begin": 0, "block_end": 1, "nbytes": 1, "nlines": 1, "mask": false}', "file_name"),
        (b"{" * 100_000, "line 1"),
    ],
)
def test_no_meta_at_all(folder, content, word):
    (folder / "meta.bin").write_bytes(content)
    with pytest.raises(UserError, match=word):
        read_meta(folder)


def test_a_missing_meta(tmp_path):
    with pytest.raises(UserError, match="a folder of CPM-Live binary data"):
        read_meta(tmp_path)


def test_a_pipe_in_place_of_the_meta_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "meta.bin")
    with pytest.raises(UserError, match="not a regular file"):
        read_meta(tmp_path)
