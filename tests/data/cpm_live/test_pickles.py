"""Arrays and lists of files as pickles: the same bytes as Python's pickler, and nothing else is read."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from cook.data.cpm_live.pickles import read_array, read_files, write_array, write_files
from cook.data.cpm_live.symbols import PickleRefused
from tests.data.cpm_live import reference


def numbers(content: bytes, begin: int = 0) -> np.ndarray:
    stretch, after = read_array(content, begin, len(content))
    assert after == len(content)
    return np.frombuffer(content[stretch.begin : stretch.end], np.int64)


# 31 | 32 and 255 | 256: one byte more for the size, the shape; 8192: larger than the pickler's frame.
@pytest.mark.parametrize("count", [0, 1, 31, 32, 255, 256, 1000, 8191, 8192, 70000])
def test_an_array_is_written_as_numpy_1_did(count):
    values = np.arange(count, dtype=np.int64) - 5
    content = write_array(values)
    assert content == reference.dumps_array(values)
    assert np.array_equal(pickle.loads(content), values)
    assert np.array_equal(numbers(content), values)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("count", [0, 7, 40, 9000])
def test_arrays_of_every_protocol_and_numpy_are_read(protocol, count):
    values = np.arange(count, dtype=np.int64)
    new = pickle.dumps(values, protocol=protocol)
    assert np.array_equal(numbers(b"xy" + new, 2), values)
    assert np.array_equal(numbers(reference.dumps_array(values)), values)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (np.arange(3, dtype=np.int32), "<i4"),
        (np.arange(3, dtype=np.float64), "<f8"),
        (np.arange(3, dtype=">i8"), ">i8"),
        (np.arange(4).reshape(2, 2), "one dimension"),
        (np.array([{}], dtype=object), "EMPTY_DICT"),
        ([1, 2, 3], "no numpy array"),
        (b"123", "no numpy array"),
        (np.int64(3), "numpy._core.multiarray.scalar"),
    ],
)
def test_anything_but_an_int64_array_is_refused(value, word):
    content = pickle.dumps(value, protocol=4)
    with pytest.raises(PickleRefused, match=word):
        read_array(content, 0, len(content))


@pytest.mark.parametrize("name", [b"_reconstruct", b"multiarray", b"dtype", b"i8"])
def test_other_names_than_an_array_s_are_refused(name):
    content = write_array(np.arange(7)).replace(name, b"x" * len(name))
    with pytest.raises(PickleRefused):
        read_array(content, 0, len(content))


def test_a_shape_that_contradicts_its_bytes_is_refused():
    content = write_array(np.arange(7)).replace(b"K\x01K\x07", b"K\x01K\x09")
    with pytest.raises(PickleRefused, match="does not go with its 56 bytes"):
        read_array(content, 0, len(content))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 30, 1000])
def test_a_list_of_files_is_written_as_cpm_live_did(count):
    states = [(f"part {n}", n, n + 1, 10 ** (n % 13), 255 * n, n % 3 == 1) for n in range(count)]
    content = write_files(states)
    assert content == reference.dumps_files(states)
    assert reference.loads_files(content) == states
    assert read_files(content) == states


def test_the_other_module_name_is_read():
    states = [("a", 0, 2, 3, 4, False)]
    assert read_files(reference.dumps_files(states, "cpm_live.data.distributed_dataset")) == states


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"a": 1}, protocol=4),
        pickle.dumps([1, 2], protocol=4),
        b"\x80\x04cposix\nsystem\n\x8c\x02id\x85R.",
        b"\x80\x04](cposix\nsystem\n\x8c\x02id\x85Re.",
        reference.dumps_files([("a", 0, 1, 1, 1, False)], "os.distributed_dataset"),
        reference.dumps_files([("a", 0, 1, 1, 1, False)]).replace(b"K\x01(", b"K\x02("),
        reference.dumps_files([("a", 0, 1, 1, "1", False)]),
        reference.dumps_files([("a", 0, 1, 1, 1)]),
    ],
)
def test_no_other_list_is_read(content):
    with pytest.raises(PickleRefused):
        read_files(content)
