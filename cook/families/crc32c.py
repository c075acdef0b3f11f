"""CRC-32C (Castagnoli), fast enough in numpy for hundreds of megabytes.

A CRC is linear over GF(2): the data is cut into lanes of one length, all lanes' checksums are computed side by side, a
byte at a time, and neighbours are put together pairwise: crc(A B) = shift(crc(A), len(B)) ^ crc(B), where shift pushes
a checksum through as many zero bytes.
"""

from __future__ import annotations

import numpy as np

POLYNOMIAL = 0x82F63B78  # reversed
MAX_LANES = 1 << 14
MIN_LANE_BYTES = 256


def _byte_table() -> np.ndarray:
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(POLYNOMIAL), values >> 1)
    return values


_TABLE = _byte_table()


def crc32c(data: bytes | np.ndarray) -> int:
    """The CRC-32C of some bytes.

    Args:
        data: Bytes, or a one-dimensional array of uint8.
    """
    values = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data
    lanes = 1
    while lanes < MAX_LANES and len(values) >= 2 * lanes * MIN_LANE_BYTES:
        lanes *= 2
    length = len(values) // lanes
    state = np.zeros(lanes, dtype=np.uint32)
    state[0] = 0xFFFFFFFF
    # Column by column: byte i of every lane.
    for column in np.ascontiguousarray(values[: lanes * length].reshape(lanes, length).T):
        state = _TABLE[(state ^ column) & 0xFF] ^ (state >> 8)
    shift = _zero_bytes(length)
    while len(state) > 1:
        state = _times(shift, state[0::2]) ^ state[1::2]
        shift = _times(shift, shift)
    crc = int(state[0])
    for byte in values[lanes * length :].tolist():
        crc = int(_TABLE[(crc ^ byte) & 0xFF]) ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _zero_bytes(count: int) -> np.ndarray:
    """The matrix over GF(2), as 32 columns of 32 bits, that pushes a checksum through `count` zero bytes."""
    basis = np.uint32(1) << np.arange(32, dtype=np.uint32)
    one = _TABLE[basis & 0xFF] ^ (basis >> 8)
    result = basis
    while count:
        if count & 1:
            result = _times(one, result)
        one, count = _times(one, one), count >> 1
    return result


def _times(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The matrix applied to each of `vectors`, 32 bits each."""
    product = np.zeros_like(vectors)
    for bit in range(32):
        product ^= np.where((vectors >> np.uint32(bit)) & 1, matrix[bit], np.uint32(0))
    return product
