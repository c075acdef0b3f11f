"""A writer of TensorFlow's checkpoint format V2 that shares nothing with the reader: the tests' fixture.

Checked once by hand against TensorFlow 2.21: it reads what the library writes, and the library reads what this writes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

NUMBERS = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19, "uint16": 14}
"""TensorFlow's types by numpy name; uint16 stands for the bits of bfloat16."""


def slow_crc(data: bytes) -> int:
    """CRC-32C, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = slow_crc(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number % 128 + 128])
        number //= 128
    return out + bytes([number])


def whole(field: int, number: int) -> bytes:
    return varint(field << 3) + varint(number)


def nested(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def block(records: Sequence[tuple[bytes, bytes]], every: int = 3) -> bytes:
    """Entries with shared prefixes, a restart every few of them."""
    out, restarts, last = b"", [], b""
    for number, (key, value) in enumerate(records):
        shared = 0
        if number % every == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(last), len(key)) and last[shared] == key[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + b"".join(struct.pack("<I", at) for at in restarts) + struct.pack("<I", len(restarts))


def table(records: Sequence[tuple[bytes, bytes]], per_block: int = 4, compression: int = 0) -> bytes:
    out = b""

    def add(content: bytes) -> bytes:
        nonlocal out
        handle = varint(len(out)) + varint(len(content))
        content += bytes([compression])
        out += content + struct.pack("<I", masked(content))
        return handle

    index = []
    for start in range(0, len(records), per_block):
        some = records[start : start + per_block]
        index.append((some[-1][0], add(block(some))))
    footer = add(block([])) + add(block(index, every=1))
    return out + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def write_checkpoint(
    prefix: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    header: bytes | None = None,
    extra: Mapping[str, bytes] | None = None,
    compression: int = 0,
) -> None:
    """Writes PREFIX.index and PREFIX.data-…; `extra` adds fields to a tensor's entry."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    data = [b""] * shards
    records = [(b"", whole(1, shards) if header is None else header)]
    for number, name in enumerate(sorted(tensors)):
        array, shard = tensors[name], number % shards
        raw = array.tobytes()
        shape = b"".join(nested(2, whole(1, size)) for size in array.shape)
        entry = whole(1, NUMBERS[str(array.dtype)]) + nested(2, shape)
        entry += whole(3, shard) + whole(4, len(data[shard])) + whole(5, len(raw))
        entry += varint(6 << 3 | 5) + struct.pack("<I", masked(raw))
        records.append((name.encode(), entry + (extra or {}).get(name, b"")))
        data[shard] += raw
    prefix.with_name(prefix.name + ".index").write_bytes(table(records, compression=compression))
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)
