"""What a loader asks of training data: numbered rows, the same on every rank; the rows of several sources as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

from cook.base.errors import UserError
from cook.data.cache import fingerprint_of


class Rows(Protocol):
    """A fixed, numbered set of rows, each one or more samples.

    Which samples share a row never changes. The targets of a sample may: a task that hides a random part of it draws
    that part from (the rows' seed, epoch, the sample's number) alone, so neither the number of ranks, nor workers, nor
    a resumed run changes a batch. Rows without such a task ignore the epoch.

    An instance is pickled to reach a worker process: one that maps files sends their paths and maps them again.
    """

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that the rows depend on; a resumed run compares it with that of its start."""

    @property
    def max_length(self) -> int:
        """L, positions of a row, prompt included."""

    @property
    def is_redrawn(self) -> bool:
        """Whether the targets of a row depend on the epoch."""

    def __len__(self) -> int:
        """Number of rows, R."""

    def batch(self, indices: np.ndarray, epoch: int = 0) -> dict[str, torch.Tensor]:
        """Builds the model's batch of the rows `indices` (B,), in any order, repeats allowed.

        Epochs count from 0; evaluation reads epoch 0.

        Returns:
            `input, position, segment, span, targets` int64 (B, L), `context` bool (B, L), `length` int64 (B,). Targets
            are already shifted: the target at i is the token at i + 1, or -100.
        """

    def num_targets(self, indices: np.ndarray, epoch: int = 0) -> np.ndarray:
        """int64 (B,), positions with a target in each of these rows in that epoch, without building them."""


class JoinedRows:
    """The rows of several sources one after another, under one numbering.

    Args:
        names: A name per source, for logs and ledgers.
        parts: The sources, all of one row length.
        weights: Proportions in which the sources are read; None: every row of every source once per epoch.

    Raises:
        UserError: A source has no rows, or rows of another length.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[Rows], weights: Sequence[float] | None = None):
        assert len(names) == len(parts) > 0 and (weights is None or len(weights) == len(parts))
        for name, part in zip(names, parts, strict=True):
            if not len(part):
                raise UserError(f"the source {name} has no rows", remedy="add text to it, or remove it")
            if part.max_length != parts[0].max_length:
                raise UserError(
                    f"the source {name} has rows of another length", wanted=parts[0].max_length, got=part.max_length
                )
        self.names, self.parts = tuple(names), tuple(parts)
        self.weights = tuple(weights) if weights is not None else None
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.max_length = parts[0].max_length
        self.is_redrawn = any(part.is_redrawn for part in parts)
        self.fingerprint = fingerprint_of(self.names, [part.fingerprint for part in parts], self.weights)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, indices: np.ndarray, epoch: int = 0) -> dict[str, torch.Tensor]:
        return merged((places, self.parts[part].batch(own, epoch)) for part, places, own in self._by_part(indices))

    def num_targets(self, indices: np.ndarray, epoch: int = 0) -> np.ndarray:
        counts = np.zeros(len(indices), np.int64)
        for part, places, own in self._by_part(indices):
            counts[places] = self.parts[part].num_targets(own, epoch)
        return counts

    def label(self, index: int) -> str:
        """`name:number` of a row inside its source."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{self.names[part]}:{index - int(self.starts[part])}"

    def _by_part(self, indices: np.ndarray) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
        indices = np.asarray(indices)
        part_of = np.searchsorted(self.starts, indices, side="right") - 1
        for part in np.unique(part_of).tolist():
            places = np.flatnonzero(part_of == part)
            yield part, places, indices[places] - self.starts[part]


def by_epoch(
    build: Callable[[np.ndarray, int], dict[str, torch.Tensor]], rows_B: np.ndarray, epochs_B: np.ndarray
) -> dict[str, torch.Tensor]:
    """A batch of rows that are read in several epochs, from one `build(rows, epoch)` per epoch."""
    epochs = np.unique(epochs_B).tolist()
    if len(epochs) == 1:
        return build(rows_B, epochs[0])
    groups = ((np.flatnonzero(epochs_B == epoch), epoch) for epoch in epochs)
    return merged((places, build(rows_B[places], epoch)) for places, epoch in groups)


def merged(groups: Iterable[tuple[np.ndarray, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """One batch from groups of rows, each with its places in the batch; together they fill all places."""
    whole = list(groups)
    if len(whole) == 1 and (np.diff(whole[0][0]) == 1).all():
        return whole[0][1]
    order = torch.from_numpy(np.argsort(np.concatenate([places for places, _ in whole]), kind="stable"))
    known = {key: value for _, batch in whole for key, value in batch.items()}
    batch = {}
    for key, some in known.items():
        parts = [group[key] if key in group else _empty(key, some, len(places)) for places, group in whole]
        batch[key] = torch.cat(parts)[order]
    return batch


def _empty(key: str, some: torch.Tensor, count: int) -> torch.Tensor:
    """Stands for what only some groups have: rows with questions have keys that plain text lacks."""
    return some.new_full((count, *some.shape[1:]), 0 if key == "choice_token" else -1)
