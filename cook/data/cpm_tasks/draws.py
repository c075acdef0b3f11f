"""Random numbers by name: every segment's draw is a function of (seed, epoch, record, segment) and of nothing else.

A counter goes through a mixing function (the finaliser of SplitMix64: Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"), so a draw costs the same whatever was drawn before, on whatever rank.
"""

from __future__ import annotations

import numpy as np

from cook.base.seeds import derived_seed

GOLDEN = 0x9E3779B97F4A7C15
_POSITION_BITS, _KEY_BITS = 20, 28
MAX_SEGMENT = 1 << _POSITION_BITS
"""Tokens of the longest segment whose parts can be drawn."""

_AT_ONCE = 1 << (64 - _POSITION_BITS - _KEY_BITS)


def epoch_key(seed: int, epoch: int) -> int:
    """What the draws of an epoch start from."""
    return derived_seed(seed, "tasks", epoch)


def mix(x: np.ndarray) -> np.ndarray:
    """64 well mixed bits for each of `x`, uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def segment_bits(key: int, record_S: np.ndarray, ordinal_S: np.ndarray) -> np.ndarray:
    """The random bits of segments, uint64 (S,).

    Args:
        key: `epoch_key`.
        record_S: Number of each segment's record.
        ordinal_S: Number of the segment in its record.
    """
    record_bits = mix(np.uint64(key) + np.uint64(GOLDEN) * (record_S.astype(np.uint64) + np.uint64(1)))
    return mix(record_bits + np.uint64(GOLDEN) * (ordinal_S.astype(np.uint64) + np.uint64(1)))


def num_hidden(bits_S: np.ndarray, length_S: np.ndarray) -> np.ndarray:
    """How many tokens of a segment are to be told: even chances from 1 to length - 1; int64 (S,), 0 below length 2."""
    choices_S = np.maximum(length_S - 1, 1).astype(np.uint64)
    return np.where(length_S > 1, 1 + (bits_S % choices_S).astype(np.int64), 0)


def hidden_subsets(bits_S: np.ndarray, length_S: np.ndarray, count_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count_S[s]` of the positions 1 to length_S[s] - 1 of every segment, each subset with the same chance.

    Every position gets a random key; the smallest keys of a segment are chosen. Segment, key and position go into one
    integer, so that a single plain sort does it for all segments, and equal keys cannot depend on the company.

    Returns:
        Segment number and position of all that were chosen, int64 (count_S.sum(),).
    """
    chosen = [
        _subsets(bits_S[begin:stop], length_S[begin:stop], count_S[begin:stop], begin)
        for begin, stop in ((begin, begin + _AT_ONCE) for begin in range(0, len(bits_S), _AT_ONCE))
    ]
    if not chosen:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate([part[0] for part in chosen]), np.concatenate([part[1] for part in chosen])


def _subsets(
    bits_S: np.ndarray, length_S: np.ndarray, count_S: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    candidates_S = np.maximum(length_S - 1, 0)
    begin_S = np.cumsum(candidates_S) - candidates_S
    position = np.arange(1, candidates_S.sum() + 1) - np.repeat(begin_S, candidates_S)
    position = position.astype(np.uint64)
    keys = mix(np.repeat(bits_S, candidates_S) + np.uint64(GOLDEN) * position) >> np.uint64(64 - _KEY_BITS)
    segment = np.repeat(np.arange(len(bits_S), dtype=np.uint64), candidates_S)
    packed = (segment << np.uint64(_KEY_BITS + _POSITION_BITS)) | (keys << np.uint64(_POSITION_BITS)) | position
    packed.sort()
    taken = np.repeat(begin_S, count_S) + np.arange(count_S.sum()) - np.repeat(np.cumsum(count_S) - count_S, count_S)
    packed = packed[taken]
    return (
        (packed >> np.uint64(_KEY_BITS + _POSITION_BITS)).astype(np.int64) + first,
        (packed & np.uint64(MAX_SEGMENT - 1)).astype(np.int64),
    )
