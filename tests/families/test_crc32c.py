"""CRC-32C against published values and a reference that goes bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from cook.families.crc32c import MIN_LANE_BYTES, crc32c
from tests.models.tf_writer import slow_crc


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),  # the check value of the CRC catalogues
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_published_values(data, value):
    assert crc32c(data) == value


@pytest.mark.parametrize("size", [1, 2 * MIN_LANE_BYTES - 1, 2 * MIN_LANE_BYTES, 4 * MIN_LANE_BYTES + 3, 9001])
def test_lanes_make_no_difference(size):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    assert crc32c(data) == slow_crc(data.tobytes()) == crc32c(data.tobytes())
