"""TensorFlow's checkpoint format V2 (a "tensor bundle"), read without TensorFlow.

`PREFIX.index` is a table in LevelDB's format: sorted keys and values in blocks, an index of the blocks, a footer. The
value of the empty key is a BundleHeaderProto; every other key is a tensor's name, and its value a BundleEntryProto with
the position of the tensor's bytes in `PREFIX.data-SSSSS-of-NNNNN`. Sources: LevelDB's doc/table_format.md, and
TensorFlow's core/protobuf/tensor_bundle.proto and core/lib/io/format.cc.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from cook.base.errors import UserError
from cook.base.files import regular_file

TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
TRAILER_BYTES = 5  # after every block: one byte for the compression, four for the masked checksum
CHECKSUM_MASK = 0xA282EAD8

# Limits far above any BERT; within them a malicious index costs about a second and a few megabytes.
MAX_INDEX_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 1024
MAX_DIMS = 16

# The types that a model's weights can have (tensorflow/core/framework/types.proto).
DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64, 19: np.float16}
BFLOAT16 = 14


class Damaged(Exception):
    """The bytes do not follow the format."""


@dataclass(frozen=True, kw_only=True)
class TfTensor:
    """A tensor of a checkpoint that is not read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: int  # TensorFlow's number of its type
    file: Path
    offset: int
    size: int  # in bytes
    checksum: int | None
    is_partitioned: bool  # whether it is stored in slices

    def read(self) -> torch.Tensor:
        """Reads the values and verifies their checksum."""
        if self.is_partitioned or (self.dtype not in DTYPES and self.dtype != BFLOAT16):
            kind, remedy = f"TensorFlow's type number {self.dtype}", None
            if self.is_partitioned:
                kind, remedy = "a partitioned variable", "save the checkpoint again without partitions"
            raise UserError(f"{self.name}: {kind} is not supported", wanted="a whole tensor of numbers", remedy=remedy)
        numpy_type = np.dtype(np.uint16 if self.dtype == BFLOAT16 else DTYPES[self.dtype]).newbyteorder("<")
        if math.prod(self.shape) * numpy_type.itemsize != self.size:
            raise UserError(f"{self.name}: {self.size} bytes do not match the shape {self.shape}")
        if self.offset + self.size > regular_file(self.file).stat().st_size:
            raise UserError(f"{self.file}: ends before {self.name}", wanted=f"{self.offset + self.size} bytes")
        try:
            with open(self.file, "rb") as opened:
                opened.seek(self.offset)
                raw = opened.read(self.size)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {error.strerror}") from None
        if self.checksum is not None and masked_checksum(raw) != self.checksum:
            what = f"{self.file}: the checksum of {self.name} is wrong"
            raise UserError(what, remedy="download the checkpoint again")
        values = torch.from_numpy(np.frombuffer(raw, dtype=numpy_type).reshape(self.shape).copy())
        return values.view(torch.bfloat16) if self.dtype == BFLOAT16 else values


def open_tf_checkpoint(prefix: Path) -> dict[str, TfTensor]:
    """The tensors of a checkpoint by TensorFlow's names; only `prefix` + `.index` is read.

    Raises:
        UserError: a file is missing, damaged, or not supported.
    """
    index = regular_file(prefix.with_name(prefix.name + ".index"), "file, one of the three of a TensorFlow checkpoint")
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise UserError(f"{index}: too large for the index of a checkpoint", wanted=f"at most {MAX_INDEX_BYTES} bytes")
    try:
        with open(index, "rb") as opened:
            records = _table(opened.read(MAX_INDEX_BYTES))
        shards = _num_shards(records)
        # Names that begin with a NUL are the slices of partitioned variables, which also have an entry for the whole.
        # A scalar such as the step may have any type: it is an error only if it is read.
        tensors = [_tensor(prefix, shards, key.decode(), value) for key, value in records if key and key[0]]
    except (Damaged, IndexError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{index}: not a valid index of a TensorFlow checkpoint", got=error) from None
    except OSError as error:
        raise UserError(f"{index}: cannot be read: {error.strerror}") from None
    for file in sorted({tensor.file for tensor in tensors}):
        regular_file(file, "data file, which belongs to the index")
    return {tensor.name: tensor for tensor in tensors}


def masked_checksum(data: bytes) -> int:
    """The CRC-32C as TensorFlow and LevelDB store it: a checksum of checksums would otherwise be a weak one."""
    value: int = google_crc32c.value(data)
    return (((value >> 15) | (value << 17)) + CHECKSUM_MASK) & 0xFFFFFFFF


def _num_shards(records: list[tuple[bytes, bytes]]) -> int:
    if not records or records[0][0] != b"":
        raise Damaged("it does not begin with a header")
    header = dict(_fields(records[0][1]))
    shards, big_endian = header.get(1, 0), header.get(2, 0)
    if not isinstance(shards, int) or shards < 1 or big_endian:
        raise Damaged("a header without shards, or of a big-endian machine")
    return shards


def _tensor(prefix: Path, shards: int, name: str, value: bytes) -> TfTensor:
    numbers = {1: 0, 3: 0, 4: 0, 5: 0}  # of dtype, shard, offset and size; the checksum, 6, may be missing
    shape: list[int] = []
    partitioned = False
    for number, content in _fields(value):
        if number == 2 and isinstance(content, bytes):
            shape += [_size_of(dim) for field, dim in _fields(content) if field == 2]
        elif number == 7:
            partitioned = True
        elif isinstance(content, int):
            numbers[number] = content
    if len(shape) > MAX_DIMS or max(shape, default=0) >= 1 << 40:
        raise Damaged(f"{name!r} has a shape that no tensor has")
    if numbers[3] >= shards:
        raise Damaged(f"{name!r} is said to be in shard {numbers[3]} of {shards}")
    return TfTensor(
        name=name,
        shape=tuple(shape),
        dtype=numbers[1],
        offset=numbers[4],
        size=numbers[5],
        checksum=numbers.get(6),
        file=prefix.with_name(f"{prefix.name}.data-{numbers[3]:05d}-of-{shards:05d}"),
        is_partitioned=partitioned,
    )


def _size_of(dim: int | bytes) -> int:
    if isinstance(dim, int):
        raise Damaged("a dimension that is no message")
    return next((size for field, size in _fields(dim) if field == 1 and isinstance(size, int)), 0)


def _table(file: bytes) -> list[tuple[bytes, bytes]]:
    """Keys and values of a table. Keys ascend and blocks follow each other, so no byte counts twice."""
    if len(file) < FOOTER_BYTES or struct.unpack("<Q", file[-8:])[0] != TABLE_MAGIC:
        raise Damaged("the table's magic number is missing at its end")
    footer = file[-FOOTER_BYTES:]
    _, at = _handle(footer, 0)  # of the table's metadata, which a bundle does not use
    index, _ = _handle(footer, at)
    records: list[tuple[bytes, bytes]] = []
    end = 0
    for _, value in _block(file, *index):
        (offset, size), _ = _handle(value, 0)
        if offset < end:
            raise Damaged(f"the block at byte {offset} begins before the end of the one before")
        end = offset + size + TRAILER_BYTES
        for key, content in _block(file, offset, size):
            if records and key <= records[-1][0]:
                raise Damaged("the names are not in order")
            records.append((key, content))
    return records


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(file: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block. A key is stored as the length of its prefix in the last key, and the rest."""
    end = offset + size
    if end + TRAILER_BYTES > len(file):
        raise Damaged("a block ends beyond the file")
    if struct.unpack("<I", file[end + 1 : end + TRAILER_BYTES])[0] != masked_checksum(file[offset : end + 1]):
        raise Damaged(f"the block at byte {offset} has a wrong checksum")
    if file[end]:
        raise Damaged(f"the block at byte {offset} is compressed, which TensorFlow's bundles are not")
    num_restarts = struct.unpack("<I", file[end - 4 : end])[0]
    at, stop, key, count = offset, end - 4 - 4 * num_restarts, b"", 0
    if stop < offset:
        raise Damaged(f"the block at byte {offset} claims more restarts than it has bytes")
    while at < stop:
        shared, at = _varint(file, at)
        rest, at = _varint(file, at)
        length, at = _varint(file, at)
        if shared > len(key) or at + rest + length > stop:
            raise Damaged(f"the block at byte {offset} holds an entry beyond its end")
        count += 1
        if shared + rest > MAX_NAME_BYTES or count > MAX_TENSORS:
            raise Damaged(f"more than {MAX_TENSORS} tensors, or a name of more than {MAX_NAME_BYTES} bytes")
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
