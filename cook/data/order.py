"""In which order an epoch reads: a permutation that depends on (seed, epoch) alone, known at any place at no cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SORTED_UP_TO = 1 << 20
"""Larger sets are permuted by a cipher: sorting a random key a row costs 16 bytes a row and process, and its time."""

ROUNDS = 6
_MIX = tuple(np.uint64(number) for number in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class EpochOrder:
    """Permutations of `range(size)`, one an epoch.

    Up to `SORTED_UP_TO` rows: the order of random keys. Above: a Feistel network (Luby and Rackoff 1988) over the
    next even power of two, walked along its cycles back into the range (Black and Rogaway 2002): a place is looked up
    in a few operations, so a start in the middle of an epoch of billions of rows costs nothing, in time or memory.

    Args:
        size: Number of rows, at least 1.
        seed: Any whole numbers >= 0; with the epoch they choose the permutation.
    """

    def __init__(self, size: int, seed: Sequence[int]):
        assert size >= 1
        self.size, self._seed = size, tuple(seed)
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._kept: dict[int, np.ndarray] = {}

    def rows(self, places: np.ndarray, epoch: int) -> np.ndarray:
        """Row numbers int64 (N,) at `places` (N,) of an epoch's order."""
        # A batch touches one epoch or two: what it does not touch is forgotten.
        self._kept = {number: order for number, order in self._kept.items() if abs(number - epoch) <= 1}
        if epoch not in self._kept:
            # Raw output of the bit generator: numpy promises its stream, not that of Generator.permutation.
            stream = np.random.Philox(np.random.SeedSequence([*self._seed, epoch]))
            small = self.size <= SORTED_UP_TO
            raw = stream.random_raw(self.size if small else ROUNDS)
            self._kept[epoch] = np.argsort(raw, kind="stable") if small else raw
        if self.size <= SORTED_UP_TO:
            return self._kept[epoch][places]
        return self._walked(np.asarray(places, np.uint64), self._kept[epoch]).astype(np.int64)

    def _walked(self, numbers: np.ndarray, keys: np.ndarray) -> np.ndarray:
        numbers = self._enciphered(numbers, keys)
        while (outside := numbers >= self.size).any():  # fewer than 3 of 4 are, so a few rounds suffice
            numbers[outside] = self._enciphered(numbers[outside], keys)
        return numbers

    def _enciphered(self, numbers: np.ndarray, keys: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = numbers >> half, numbers & mask
        for key in keys:
            left, right = right, left ^ (_hashed(right ^ key) & mask)
        return (left << half) | right


def _hashed(words: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood 2014), elementwise on uint64."""
    words = (words ^ (words >> np.uint64(30))) * _MIX[0]
    words = (words ^ (words >> np.uint64(27))) * _MIX[1]
    return words ^ (words >> np.uint64(31))


class Draws:
    """Which source each row of a run comes from, for given weights.

    The sources take turns as evenly as their weights allow: the pattern repeats after `PERIOD` rows, and how often each
    source occurs before any row number is known without counting. When the weights change, a new pattern begins at
    that row number; the numbers read so far and the weights are all there is to save.

    Args:
        weights: (S,), not negative; only their ratios count.
        begin: Row number at which these weights begin to hold.
        read: Rows that each source has given before `begin`.
    """

    PERIOD = 1 << 14

    def __init__(self, weights: Sequence[float], begin: int = 0, read: Sequence[int] | None = None):
        shares = np.asarray(weights, np.float64)
        assert shares.ndim == 1 and np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0, weights
        self.weights = tuple((shares / shares.sum()).tolist())
        self.begin, self.read = begin, tuple(read) if read is not None else (0,) * len(shares)
        quota_S = _apportioned(np.array(self.weights), self.PERIOD)
        source_P = np.repeat(np.arange(len(shares)), quota_S)
        # The j-th of a source's q turns stands at (j + 1/2) / q of the period.
        turn_P = (np.arange(self.PERIOD) - np.repeat(np.cumsum(quota_S) - quota_S, quota_S) + 0.5) / quota_S[source_P]
        self._source_P = source_P[np.argsort(turn_P, kind="stable")]
        taken = np.zeros((self.PERIOD + 1, len(shares)), np.int64)
        taken[np.arange(1, self.PERIOD + 1), self._source_P] = 1
        self._taken_PS = np.cumsum(taken, axis=0)

    def counts(self, number: int) -> np.ndarray:
        """Rows (S,) that each source has given before row `number` of the run."""
        assert number >= self.begin, "rows before the last change of weights are not known any more"
        periods, rest = divmod(number - self.begin, self.PERIOD)
        return np.array(self.read) + periods * self._taken_PS[-1] + self._taken_PS[rest]

    def draw(self, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The source (count,) of each row from number `begin` on, and how many rows that source gave before it."""
        places = (begin - self.begin + np.arange(count)) % self.PERIOD
        source = self._source_P[places]
        own = np.zeros(count, np.int64)
        for s, before in enumerate(self.counts(begin).tolist()):
            mine = source == s
            own[mine] = before + np.arange(mine.sum())
        return source, own


def _apportioned(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that sum to `total` in these shares (largest remainders); a share above 0 gets at least 1."""
    exact = shares * total
    whole = np.where(shares > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while (missing := total - int(whole.sum())) != 0:
        step = 1 if missing > 0 else -1
        # Those furthest below (above) their exact share give way first, one each.
        gap = np.where((shares > 0) & ((step > 0) | (whole > 1)), step * (exact - whole), -np.inf)
        first = np.argsort(-gap, kind="stable")[: abs(missing)]
        whole[first[np.isfinite(gap[first])]] += step
    return whole
