"""TensorFlow's checkpoint format V2 (a "tensor bundle"), read without TensorFlow.

`PREFIX.index` is a table in LevelDB's format: sorted keys and values in blocks, an index of the blocks, a footer. The
value of the empty key is a BundleHeaderProto; every other key is a tensor's name and its value a BundleEntryProto that
says where in `PREFIX.data-SSSSS-of-NNNNN` the tensor's bytes lie. Sources: LevelDB's doc/table_format.md, and
TensorFlow's core/protobuf/tensor_bundle.proto and core/lib/io/format.cc.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cook.base.errors import UserError
from cook.base.tensor_files import LazyTensors
from cook.families.crc32c import crc32c

TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
TRAILER_BYTES = 5
"""After every block: one byte for the compression, four for the masked checksum."""
CHECKSUM_MASK = 0xA282EAD8

# The kinds of tensor that a model's weights can be (tensorflow/core/framework/types.proto).
DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64, 19: np.float16}
BFLOAT16 = 14


class Damaged(Exception):
    """The bytes are not what the format says."""


class _Entry(NamedTuple):
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int | None
    is_sliced: bool


def open_tf_checkpoint(prefix: Path) -> LazyTensors:
    """The tensors of a checkpoint by TensorFlow's names, each read, and its checksum compared, when asked for.

    Args:
        prefix: Path without `.index`, such as `uncased_L-12_H-768_A-12/bert_model.ckpt`.

    Raises:
        UserError: a file is missing, damaged, or holds what this reader does not know.
    """
    index = prefix.with_name(prefix.name + ".index")
    if not index.is_file():
        raise UserError(f"{index}: there is no such file", wanted="the three files of a TensorFlow checkpoint")
    try:
        records = list(_table(index.read_bytes()))
        shards = _num_shards(records)
        entries = {key.decode(): _entry(value) for key, value in records[1:]}
    except (Damaged, IndexError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{index}: not a sound index of a TensorFlow checkpoint", got=error) from None
    files = [prefix.with_name(f"{prefix.name}.data-{number:05d}-of-{shards:05d}") for number in range(shards)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: there is no such file", wanted="the data file that belongs to the index")
    # A scalar such as the step may be of any kind: it is an error only if someone asks for it.
    return LazyTensors({name: partial(_read, files, name, entry) for name, entry in entries.items()})


def masked_checksum(data: bytes | np.ndarray) -> int:
    """The CRC-32C as TensorFlow and LevelDB store it: a checksum of checksums would otherwise be a weak one."""
    value = crc32c(data)
    return (((value >> 15) | (value << 17)) + CHECKSUM_MASK) & 0xFFFFFFFF


def _read(files: list[Path], name: str, entry: _Entry) -> torch.Tensor:
    if entry.is_sliced or (entry.dtype not in DTYPES and entry.dtype != BFLOAT16):
        kind = "a partitioned tensor" if entry.is_sliced else f"TensorFlow's type number {entry.dtype}"
        raise UserError(f"{name}: this reader does not know {kind}", wanted="a whole tensor of numbers")
    if entry.shard >= len(files):
        raise UserError(f"{name}: the index names shard {entry.shard} of {len(files)}")
    file = files[entry.shard]
    count = int(np.prod(entry.shape, dtype=np.int64))
    numpy_type = np.dtype(np.uint16 if entry.dtype == BFLOAT16 else DTYPES[entry.dtype]).newbyteorder("<")
    if count * numpy_type.itemsize != entry.size:
        raise UserError(f"{name}: {entry.size} bytes do not hold the shape {entry.shape}")
    with open(file, "rb") as opened:
        opened.seek(entry.offset)
        raw = np.frombuffer(opened.read(entry.size), dtype=np.uint8)
    if len(raw) != entry.size:
        raise UserError(f"{file}: ends before {name}", wanted=f"{entry.offset + entry.size} bytes")
    if entry.checksum is not None and masked_checksum(raw) != entry.checksum:
        raise UserError(f"{file}: the checksum of {name} is wrong", remedy="fetch the checkpoint again")
    values = torch.from_numpy(raw.view(numpy_type).reshape(entry.shape).copy())
    return values.view(torch.bfloat16) if entry.dtype == BFLOAT16 else values


def _num_shards(records: list[tuple[bytes, bytes]]) -> int:
    if not records or records[0][0] != b"":
        raise Damaged("it does not begin with a header")
    header = dict(_fields(records[0][1]))
    shards, big_endian = header.get(1, 0), header.get(2, 0)
    if not isinstance(shards, int) or shards < 1 or big_endian:
        raise Damaged("a header without shards, or of a big-endian machine")
    return shards


def _entry(value: bytes) -> _Entry:
    dtype = shard = offset = size = 0
    checksum, shape, is_sliced = None, [], False
    for number, content in _fields(value):
        if number == 2 and isinstance(content, bytes):
            for _, dim in (field for field in _fields(content) if field[0] == 2):
                assert isinstance(dim, bytes)
                shape.append(next((size for n, size in _fields(dim) if n == 1 and isinstance(size, int)), 0))
        elif number == 7:
            is_sliced = True
        elif isinstance(content, int):
            dtype = content if number == 1 else dtype
            shard = content if number == 3 else shard
            offset = content if number == 4 else offset
            size = content if number == 5 else size
            checksum = content if number == 6 else checksum
    return _Entry(dtype, tuple(shape), shard, offset, size, checksum, is_sliced)


def _table(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a table, in order."""
    if len(file) < FOOTER_BYTES or struct.unpack("<Q", file[-8:])[0] != TABLE_MAGIC:
        raise Damaged("the table's magic number is missing at its end")
    footer = file[-FOOTER_BYTES:]
    _, at = _handle(footer, 0)  # of the table's metadata, which a bundle does not use
    index, _ = _handle(footer, at)
    for _, value in _block(file, *index):
        handle, _ = _handle(value, 0)
        yield from _block(file, *handle)


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(file: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block; a key is stored as what it shares with the one before, and its own rest."""
    end = offset + size
    if end + TRAILER_BYTES > len(file):
        raise Damaged("a block ends beyond the file")
    if struct.unpack("<I", file[end + 1 : end + TRAILER_BYTES])[0] != masked_checksum(file[offset : end + 1]):
        raise Damaged(f"the block at byte {offset} has a wrong checksum")
    if file[end]:
        raise Damaged(f"the block at byte {offset} is compressed, which TensorFlow's bundles are not")
    num_restarts = struct.unpack("<I", file[end - 4 : end])[0]
    at, stop, key = offset, end - 4 - 4 * num_restarts, b""
    if stop < offset:
        raise Damaged(f"the block at byte {offset} claims more restarts than it has bytes")
    while at < stop:
        shared, at = _varint(file, at)
        rest, at = _varint(file, at)
        length, at = _varint(file, at)
        if shared > len(key) or at + rest + length > stop:
            raise Damaged(f"the block at byte {offset} holds an entry beyond its end")
        key = key[:shared] + file[at : at + rest]
        yield key, file[at + rest : at + rest + length]
        at += rest + length


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protocol buffer: varints and fixed numbers as int, the rest as bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
        elif wire in (1, 5):
            width = 8 if wire == 1 else 4
            yield number, int.from_bytes(_bytes(message, at, width), "little")
            at += width
        elif wire == 2:
            length, at = _varint(message, at)
            yield number, _bytes(message, at, length)
            at += length
        else:
            raise Damaged(f"a field of the unknown wire type {wire}")


def _bytes(message: bytes, at: int, length: int) -> bytes:
    if at + length > len(message):
        raise Damaged("a field ends beyond its message")
    return message[at : at + length]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise Damaged("a number of more than 64 bits")
