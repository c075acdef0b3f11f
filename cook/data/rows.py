"""What a loader asks of training data, whatever it was read from: rows by number, the same on every rank."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch


class Rows(Protocol):
    """A fixed, numbered set of rows, each one or more samples.

    Which samples share a row never changes. What is asked of a sample may: a task that hides a random part of it draws
    that part as a function of (the rows' seed, epoch, the sample's number) alone, so neither the number of ranks, nor
    workers, nor a resumed run changes a batch. Rows without such a task ignore the epoch.

    An instance travels to a worker process by pickling: one that maps files sends their paths and maps them again.
    """

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that the rows depend on; a resumed run compares it with the one it began with."""

    @property
    def max_length(self) -> int:
        """L, positions of a row, prompt included."""

    @property
    def is_redrawn(self) -> bool:
        """Whether the epoch changes what is asked of a row."""

    def __len__(self) -> int:
        """Number of rows, R."""

    def batch(self, indices: np.ndarray, epoch: int = 0) -> dict[str, torch.Tensor]:
        """Builds the model's batch of some rows.

        Args:
            indices: (B,) row numbers, in any order, repeats allowed.
            epoch: Counted from 0; evaluation reads epoch 0.

        Returns:
            `input, position, segment, span, targets` int64 (B, L), `context` bool (B, L), `length` int64 (B,). Targets
            are already shifted: the target at i is the token at i + 1, or -100.
        """

    def num_targets(self, indices: np.ndarray, epoch: int = 0) -> np.ndarray:
        """int64 (B,), positions that have a target in each of these rows in that epoch, without building them."""
