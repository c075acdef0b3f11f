"""In which order rows are read: the permutations of epochs, whose turn it is among sources, and weights that change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cook.base.errors import UserError

SORTED_UP_TO = 1 << 20
"""Larger sets are permuted by a cipher: sorting a random key per row takes time, and 16 bytes per row and process."""

ROUNDS = 6


class EpochOrder:
    """Permutations of `range(size)`, one per epoch.

    Up to `SORTED_UP_TO` rows: the order of random keys. Above: a Feistel network (Luby and Rackoff 1988) over the
    next even power of two, walked along its cycles back into the range (Black and Rogaway 2002). It finds the row at a
    place in a few operations, so a start in the middle of an epoch of billions of rows costs no time or memory.

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
        # A batch touches one epoch or two; the others are forgotten.
        self._kept = {number: order for number, order in self._kept.items() if abs(number - epoch) <= 1}
        if epoch not in self._kept:
            # Raw output of the bit generator: numpy promises its stream, not that of Generator.permutation.
            stream = np.random.Philox(np.random.SeedSequence([*self._seed, epoch]))
            small = self.size <= SORTED_UP_TO
            raw = stream.random_raw(self.size if small else ROUNDS)
            self._kept[epoch] = np.argsort(raw, kind="stable") if small else raw
        if self.size <= SORTED_UP_TO:
            return self._kept[epoch][places]
        keys, numbers = self._kept[epoch], self._enciphered(np.asarray(places, np.uint64), self._kept[epoch])
        while (outside := numbers >= self.size).any():  # fewer than 3 of 4 are, so a few rounds suffice
            numbers[outside] = self._enciphered(numbers[outside], keys)
        return numbers.astype(np.int64)

    def _enciphered(self, numbers: np.ndarray, keys: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = numbers >> half, numbers & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        return (left << half) | right


def mix(words: np.ndarray) -> np.ndarray:
    """64 well mixed bits for each of `words`, uint64: SplitMix64's finaliser (Steele, Lea and Flood 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def chosen_below(places: np.ndarray, fraction: float) -> np.ndarray:
    """bool (N,), True where a place in [0, 1) is below `fraction`.

    If all of at least two fall on one side, the one nearest to the border changes sides.

    Raises:
        UserError: The fraction is not between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise UserError("data.held_out is not a fraction", wanted="between 0 and 1, both excluded", got=fraction)
    chosen = places < fraction
    if len(places) > 1 and not chosen.any():
        chosen[places.argmin()] = True
    elif len(places) > 1 and chosen.all():
        chosen[places.argmax()] = False
    return chosen


class Draws:
    """Which source each row of a run comes from, for given weights.

    The sources take turns as evenly as their weights allow. The pattern repeats after `PERIOD` rows, so how often each
    source occurs before any row number is known without counting. When the weights change, a new pattern begins at
    that row number; the weights and the numbers read so far are all that has to be saved.

    Args:
        weights: (S,), not negative; only their ratios count.
        begin: Row number from which these weights hold.
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
        assert number >= self.begin, "rows before the last change of weights are no longer known"
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

    def reweighed(self, weights: Sequence[float], number: int) -> Draws:
        """These draws up to row `number`, other weights from there on."""
        return Draws(weights, number, self.counts(number).tolist())

    def record(self) -> dict[str, Any]:
        """The arguments as JSON."""
        return {"begin": self.begin, "read": list(self.read), "weights": list(self.weights)}


def _apportioned(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that sum to `total` in these shares (largest remainders); a share above 0 gets at least 1."""
    exact = shares * total
    whole = np.where(shares > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while (missing := total - int(whole.sum())) != 0:
        step = 1 if missing > 0 else -1
        # Those furthest below (above) their exact share change first, by one each.
        gap = np.where((shares > 0) & ((step > 0) | (whole > 1)), step * (exact - whole), -np.inf)
        first = np.argsort(-gap, kind="stable")[: abs(missing)]
        whole[first[np.isfinite(gap[first])]] += step
    return whole


def updated_weights(
    weights: Sequence[float], losses: Sequence[float], references: Sequence[float]
) -> tuple[float, ...]:
    """One update of dynamic batch loading, Algorithm 1 of Sheared LLaMA (Xia et al. 2023, arXiv 2310.06694).

    Δ_i = max(ℓ_i − ℓ_i_ref, 0), α_i = w_i · exp(Δ_i), w_i ← α_i / Σ_j α_j: a source whose loss is above its reference
    is read more often, the others less.

    Args:
        weights: (S,) present shares of the sources.
        losses: (S,) held-out loss of each source, in nats per token.
        references: (S,) target loss of each source.

    Returns:
        (S,) shares that sum to 1. A loss that is not finite leaves the shares as they are.
    """
    if not all(map(math.isfinite, losses)):
        return tuple(weights)
    excess = [max(loss - reference, 0.0) for loss, reference in zip(losses, references, strict=True)]
    # Divided by the factor of the largest excess, which the ratio cancels, nothing overflows.
    grown = [weight * math.exp(delta - max(excess)) for weight, delta in zip(weights, excess, strict=True)]
    return tuple(value / sum(grown) for value in grown)
