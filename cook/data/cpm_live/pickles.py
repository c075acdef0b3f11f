"""The two things that CPM-Live's binary data pickles: an int64 array, and the list of a folder's files.

Reading recognises the symbols of `cook.data.cpm_live.symbols`; writing emits the opcodes of Python's pickler at
protocol 4 (the default from Python 3.8 to 3.13) with numpy 1. numpy 2 has moved its module to `numpy._core`, a name
that older ones cannot import; both are read, the old one is written.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from cook.data.cpm_live.symbols import Call, Name, PickleRefused, Stretch, read_symbols

INT64 = np.dtype("<i8")
MAX_ARRAY_OPCODES = 200  # an array takes about 60
OPCODES_A_FILE = 64  # a file's entry takes about 25
FILE_INFO = "cpm_live.dataset.distributed_dataset"
FILE_INFO_MODULES = (FILE_INFO, "cpm_live.data.distributed_dataset")

_RECONSTRUCT = tuple(Name(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core"))
_FROM_BUFFER = tuple(Name(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core"))
_FRAME_BYTES = 64 * 1024  # the pickler leaves larger bytes outside of its frames


def read_array(buffer: Any, begin: int, end: int) -> tuple[Stretch, int]:
    """Finds the numbers of a pickled int64 array (num,) in bytes or the map of a file, between two offsets.

    Returns:
        The stretch of the buffer with the numbers, and the offset after the pickle.

    Raises:
        PickleRefused: It is anything else.
    """
    value, after = read_symbols(buffer, begin, end, MAX_ARRAY_OPCODES)
    shape, dtype, order, data = _parts_of_array(value, begin)
    code = _dtype_code(dtype)
    if code != "<i8":
        raise PickleRefused(begin, f"the array's dtype is {code or 'unknown'}, not int64 (<i8)")
    if not (isinstance(shape, tuple) and len(shape) == 1 and type(shape[0]) is int and isinstance(data, Stretch)):
        raise PickleRefused(begin, "the array does not have one dimension")
    if order is not False and order != "C" or shape[0] * INT64.itemsize != data.end - data.begin:
        raise PickleRefused(begin, f"the array's shape {shape} does not go with its {data.end - data.begin} bytes")
    return data, after


def _parts_of_array(value: Any, at: int) -> tuple[Any, Any, Any, Any]:
    """Shape, dtype, order and bytes, from one of numpy's two ways to pickle an array."""
    if isinstance(value, Call):
        if value.function in _RECONSTRUCT and isinstance(value.state, tuple) and len(value.state) == 5:
            _, shape, dtype, order, data = value.state
            return shape, dtype, order, data
        if value.function in _FROM_BUFFER and value.state is None and len(value.arguments) == 4:
            data, dtype, shape, order = value.arguments
            return shape, dtype, order, data
        if isinstance(value.function, Name):
            name = f"{value.function.module}.{value.function.name}"
            raise PickleRefused(at, f"the pickle calls {name}, which no array does")
    raise PickleRefused(at, "the pickle is no numpy array")


def _dtype_code(dtype: Any) -> str | None:
    """Byte order and type of a pickled dtype, `<i8`; None if it is none."""
    if not isinstance(dtype, Call) or dtype.function != Name("numpy", "dtype") or not dtype.arguments:
        return None
    code, order = dtype.arguments[0], dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else ""
    return f"{order}{code}" if isinstance(code, str) and isinstance(order, str) else None


_ARRAY_HEAD = (
    b"\x8c\x15numpy.core.multiarray\x94\x8c\x0c_reconstruct\x94\x93\x94\x8c\x05numpy\x94\x8c\x07ndarray\x94\x93\x94"
    b"K\x00\x85\x94C\x01b\x94\x87\x94R\x94(K\x01"
)
_ARRAY_DTYPE = (
    b"\x85\x94h\x03\x8c\x05dtype\x94\x93\x94\x8c\x02i8\x94\x89\x88\x87\x94R\x94"
    b"(K\x03\x8c\x01<\x94NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t\x94b\x89"
)
_ARRAY_TAIL = b"\x94t\x94b."


def write_array(values: np.ndarray) -> bytes:
    """The pickle of an int64 array (num,), the same bytes as CPM-Live's `pickle.dumps`."""
    data = np.ascontiguousarray(values, INT64).tobytes()
    head = _ARRAY_HEAD + _int(len(values)) + _ARRAY_DTYPE
    size = b"C" + struct.pack("<B", len(data)) if len(data) < 256 else b"B" + struct.pack("<I", len(data))
    if len(data) < _FRAME_BYTES:
        return b"\x80\x04" + _frame(head + size + data + _ARRAY_TAIL)
    return b"\x80\x04" + _frame(head) + size + data + _frame(_ARRAY_TAIL)


def read_files(content: bytes) -> list[tuple]:
    """The states `(file_name, block_begin, block_end, nbytes, nlines, mask)` of a version-1 `meta.bin`.

    Raises:
        PickleRefused: It is anything else.
    """
    value, _ = read_symbols(content, 0, len(content), 1000 + OPCODES_A_FILE * (1 + len(content) // 32))
    if not isinstance(value, list):
        raise PickleRefused(0, "the pickle is no list of files")
    return [_file_state(item, number) for number, item in enumerate(value)]


def _file_state(item: Any, number: int) -> tuple:
    what = f"entry {number} of the list is no file"
    if not isinstance(item, Call) or item.state is not None or not isinstance(item.function, Call):
        called = item.function if isinstance(item, Call) and isinstance(item.function, Name) else None
        raise PickleRefused(0, f"{what}: it calls {called.module}.{called.name}" if called else what)
    found, arguments = item.function.arguments, item.arguments
    is_loader = (
        item.function.function == Name("builtins", "getattr")
        and item.function.state is None
        and len(found) == 2
        and found[0] in [Name(module, "FileInfo") for module in FILE_INFO_MODULES]
        and found[1] == "_load_from_state"
    )
    if not is_loader or len(arguments) != 2 or arguments[0] != 1:
        raise PickleRefused(0, f"{what} of version 1")
    state = arguments[1]
    if not isinstance(state, tuple) or [type(value) for value in state] != [str, int, int, int, int, bool]:
        raise PickleRefused(0, f"{what}: its values are of other types than a file's")
    return state


def write_files(states: Sequence[tuple]) -> bytes:
    """The pickle of a version-1 `meta.bin`, from the states that `read_files` gives."""
    names: dict[str, int] = {}
    body, memo = b"", 1  # the list itself is memo 0

    def named(key: str, spelled: bytes, uses: int) -> bytes:
        """Spelled out the first time, which fills `uses` places of the memo; later the last of them."""
        nonlocal memo
        if key in names:
            return b"h" + struct.pack("<B", names[key])
        memo += uses
        names[key] = memo - 1
        return spelled

    for name, begin, end, nbytes, nlines, mask in states:
        body += named("getattr", _global("builtins", "getattr"), 3) + named("class", _global(FILE_INFO, "FileInfo"), 3)
        body += named("loader", _text("_load_from_state"), 1) + b"\x86\x94R\x94K\x01("
        body += _text(name) + b"".join(map(_int, (begin, end, nbytes, nlines)))
        body += (b"\x88" if mask else b"\x89") + b"t\x94\x86\x94R\x94"
        memo += 6  # the pair, the bound loader, the name, the state, the arguments, the file
    if len(states) == 1:
        body += b"a"
    elif states:
        body = b"(" + body + b"e"
    return b"\x80\x04" + _frame(b"]\x94" + body + b".")


def _frame(body: bytes) -> bytes:
    return b"\x95" + struct.pack("<Q", len(body)) + body if len(body) >= 4 else body


def _text(text: str) -> bytes:
    encoded = text.encode()
    size = b"\x8c" + struct.pack("<B", len(encoded)) if len(encoded) < 256 else b"X" + struct.pack("<I", len(encoded))
    return size + encoded + b"\x94"


def _global(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93\x94"


def _int(value: int) -> bytes:
    if 0 <= value < 1 << 16:
        return b"K" + struct.pack("<B", value) if value < 256 else b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    length = value.bit_length() // 8 + 1
    return b"\x8a" + struct.pack("<B", length) + value.to_bytes(length, "little", signed=True)
