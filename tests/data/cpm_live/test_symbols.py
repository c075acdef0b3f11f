"""Reading a pickle without running it."""

from __future__ import annotations

import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cook.data.cpm_live.symbols import Call, Name, PickleRefused, Stretch, read_symbols

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple),
    max_leaves=12,
)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@given(value=PLAIN)
def test_plain_values_are_what_pickle_reads(protocol, value):
    content = b"before" + pickle.dumps(value, protocol=protocol)
    assert read_symbols(content + b"after", 6, len(content), 1000) == (value, len(content))


def test_bytes_are_not_copied():
    content = pickle.dumps(b"x" * 300, protocol=4)
    value, _ = read_symbols(content, 0, len(content), 10)
    assert isinstance(value, Stretch) and content[value.begin : value.end] == b"x" * 300


def test_a_call_becomes_a_symbol():
    content = b"\x80\x04cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R."
    value, after = read_symbols(content, 0, len(content), 40)
    assert after == len(content)
    assert isinstance(value, Call) and value.function == Name("builtins", "eval") and value.arguments == ("1+1",)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "bytes"),
        (b"\x80\x04", "bytes"),
        (b"\x80\x04K", "bytes"),
        (b"\x80\x04B\xff\xff\xff\x7fabc", "bytes"),
        (b"\x80\x04X\xff\xff\xff\x7fabc", "text"),
        (b"\x80\x04.", "more values"),
        (b"\x80\x04t.", "no mark"),
        (b"\x80\x04h\x05.", "malformed"),
        (b"\x80\x04K\x01b.", "more values"),
        (b"\x80\x04NNR.", "malformed"),
        (b"\x80\x04NNb.", "malformed"),
        (b"\x80\x04Na.", "more values"),
        (b"\x80\x04cno end of the name", "without an end"),
        (b"\x80\x04\x8c\x01\xff.", "malformed"),
        (b"\x80\x04I1\n.", "INT"),
        (b"\x80\x04}.", "EMPTY_DICT"),
        (b"\x80\x04\x81.", "NEWOBJ"),
        (b"\x80\x04(ios\nsystem\n.", "INST"),
        (b"\x80\x04P1\n.", "PERSID"),
        (b"\x80\x04\xfe.", "0xfe"),
    ],
)
def test_what_is_refused_is_named(content, word):
    with pytest.raises(PickleRefused, match=word):
        read_symbols(content, 0, len(content), 100)


def test_a_long_program_is_refused():
    with pytest.raises(PickleRefused, match="more than 50 opcodes"):
        read_symbols(b"\x80\x04" + b"N" * 100 + b".", 0, 103, 50)


def test_a_far_place_of_the_memo_takes_no_memory():
    # Python's own unpickler makes room for all places up to the named one: 16 GB here.
    content = b"\x80\x04K\x07r" + struct.pack("<I", 2**31) + b"0j"[1:] + struct.pack("<I", 2**31) + b"."
    assert read_symbols(content, 0, len(content), 10)[0] == 7


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_a_refusal(content):
    try:
        read_symbols(b"\x80\x04" + content, 0, len(content) + 2, 1000)
    except PickleRefused:
        pass
