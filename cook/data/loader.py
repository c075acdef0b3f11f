"""Which rows a step reads: a function of the seed and the step's number, not of ranks, workers or history."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from cook.base.batches import Batch
from cook.base.errors import UserError
from cook.data.packing import NO_TARGET, PackedRows


class RowLoader:
    """Global batches of shuffled rows. The state of a run is the number of its next step, so resuming costs nothing.

    Counting rows over the whole run, row i of step s is number first + s * train_batch_size + i; number n is at place
    n mod num_rows of epoch n div num_rows. An epoch's last rows share a batch with the next epoch's first ones: every
    row is read exactly once in each epoch.

    Args:
        rows: The rows.
        train_batch_size: Rows in a global batch, over all ranks and micro-batches.
        seed: Orders the epochs; epoch e's order depends on (seed, e) alone.
        first: The number of the first row of step 0, for a run that reads on where an earlier one ended.

    Raises:
        UserError: There are no rows.
    """

    def __init__(self, rows: PackedRows, *, train_batch_size: int, seed: int, first: int = 0):
        assert train_batch_size >= 1
        if not len(rows):
            raise UserError("the corpus is too small: there is no row to train on", remedy="give more text")
        self.rows, self.train_batch_size, self.seed, self.first = rows, train_batch_size, seed, first
        self._orders: dict[int, np.ndarray] = {}  # a batch touches few epochs, so few are kept

    def indices(self, step: int) -> np.ndarray:
        """Row numbers (train_batch_size,) of the global batch of a step, counted from 0."""
        numbers = self.first + np.arange(step * self.train_batch_size, (step + 1) * self.train_batch_size)
        epochs, places = np.divmod(numbers, len(self.rows))
        needed = {int(epoch): self._order(int(epoch)) for epoch in np.unique(epochs)}
        self._orders = needed
        return np.array([needed[epoch][place] for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)])

    def micro_batches(
        self, step: int, rank: int, world_size: int, micro_batch_size: int
    ) -> list[Batch]:
        """A rank's share of a step's global batch, cut into micro-batches.

        Ranks take consecutive shares, so any number of ranks reads the same rows in the same step.

        Raises:
            UserError: The global batch is not a multiple of world_size * micro_batch_size.
        """
        if self.train_batch_size % (world_size * micro_batch_size):
            raise UserError(
                "the global batch does not divide among the ranks",
                wanted=f"train_batch_size a multiple of {world_size} ranks x {micro_batch_size} rows a micro-batch",
                got=self.train_batch_size,
            )
        share = self.indices(step).reshape(world_size, -1, micro_batch_size)[rank]
        return [self.rows.batch(indices) for indices in share]

    def num_targets(self, step: int) -> int:
        """Positions with a target in the whole global batch: the divisor of a summed loss."""
        return int(self.rows.num_targets[self.indices(step)].sum())

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # Raw output of the bit generator: numpy promises its stream, not that of Generator.permutation.
            raw = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.rows))
            self._orders[epoch] = np.argsort(raw, kind="stable")
        return self._orders[epoch]


def held_out_batches(
    rows: PackedRows, batch_size: int, max_rows: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Batches of a fixed, evenly spread subset of rows, shared out over ranks.

    Every rank yields the same number of batches of the same shapes, because under ZeRO-3 a forward pass needs all
    ranks. Where the rows do not divide, places are filled with a row whose targets are all -100: add up losses and
    targets over ranks and divide once; a rank's own mean may be 0 / 0.

    Args:
        rows: Held-out rows.
        batch_size: Rows of a batch on one rank.
        max_rows: Size of the subset; all rows if there are fewer.
        rank: This rank.
        world_size: Number of ranks.
    """
    assert batch_size >= 1 and max_rows >= 1 and 0 <= rank < world_size
    count = min(max_rows, len(rows))
    chosen = np.arange(count) * len(rows) // count
    places = np.arange(rank, -(-count // world_size) * world_size, world_size)
    for begin in range(0, len(places), batch_size):
        some = places[begin : begin + batch_size]
        batch = rows.batch(chosen[np.minimum(some, count - 1)])
        batch["targets"][torch.from_numpy(some >= count)] = NO_TARGET
        yield batch
