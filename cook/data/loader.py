"""The data loader. The rows of a step depend only on the seed and the step, not on ranks, workers or earlier steps."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cook.base.batches import Batch
from cook.base.device import accelerator
from cook.base.errors import UserError
from cook.data.cpm_tasks.batches import NO_CHOICE
from cook.data.order import Draws, EpochOrder
from cook.data.packing import NO_TARGET
from cook.data.rows import JoinedRows, Rows
from cook.data.workers import Plan, Workers, build


class Loader(ABC):
    """What the loaders share: the place in a run, whose turn it is among the sources, and the ledger.

    Counting rows over the whole run, row i of step s is number first + s * train_batch_size + i.

    Args:
        fingerprint: Of the data.
        train_batch_size: Rows in a global batch, over all ranks and micro-batches.
        seed: Orders the epochs.
        first: The number of the first row of step 0, for a run that continues an earlier one.
        ledger: A folder for `ledger-<rank>.jsonl`, the names of the rows of every batch; None: no ledger.
        draws: Whose turn it is; None: there are no weights.
    """

    def __init__(
        self, fingerprint: str, train_batch_size: int, seed: int, first: int, ledger: Path | None, draws: Draws | None
    ):
        assert train_batch_size >= 1
        self._fingerprint, self.train_batch_size, self.seed, self.first = fingerprint, train_batch_size, seed, first
        self._ledger, self._draws = ledger, draws
        self._next_step = 0

    @property
    def next_step(self) -> int:
        """The step after the last one that was read."""
        return self._next_step

    @property
    def weights(self) -> tuple[float, ...] | None:
        """How often each source is read now; None where every row is read once per epoch."""
        return self._draws.weights if self._draws else None

    @abstractmethod
    def sample_ids(self, step: int, rank: int = 0, world_size: int = 1) -> list[str]:
        """Names of a rank's share of a step, in the order in which they are read."""

    def reweigh(self, weights: Sequence[float], step: int) -> None:
        """Reads the sources in other proportions from `step` on; earlier steps can no longer be read."""
        assert self._draws is not None, "only sources with weights can get other weights"
        self._draws = self._draws.reweighed(weights, self._number(step))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON: the number of the next row, and the weights from there on.

        The row number counts over all stages; `seed` and `data` show whether the state belongs to this data.
        """
        state = {"row": self._number(self._next_step), "seed": self.seed, "data": self._fingerprint}
        return state | ({"draws": self._draws.record()} if self._draws else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes where `state_dict` was taken, in constant time, with any number of ranks and workers.

        From the state of an earlier loader with the same `first` or less, the row number gives the next step.

        Raises:
            UserError: The state belongs to other data or another seed.
        """
        for key, mine in (("data", self._fingerprint), ("seed", self.seed)):
            if state.get(key) != mine:
                raise UserError(
                    f"the saved position belongs to another {'corpus' if key == 'data' else key}",
                    wanted=mine,
                    got=state.get(key),
                    remedy="restore the data and its settings, or start over with --resume never",
                )
        ahead, rest = divmod(int(state["row"]) - self.first, self.train_batch_size)
        assert ahead >= 0 and not rest, (state["row"], self.first, self.train_batch_size)
        self._next_step = ahead
        if self._draws:
            saved = state["draws"]
            self._draws = Draws(saved["weights"], int(saved["begin"]), saved["read"])

    def _number(self, step: int) -> int:
        """The number of the first row of a step."""
        return self.first + step * self.train_batch_size

    def _has_read(self, step: int, rank: int, world_size: int) -> None:
        self._next_step = step + 1
        if self._ledger is not None:
            record = {"step": step, "world_size": world_size, "samples": self.sample_ids(step, rank, world_size)}
            self._ledger.mkdir(parents=True, exist_ok=True)
            with open(self._ledger / f"ledger-{rank}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def pinned(batches: list[Batch]) -> list[Batch]:
    """The batches in page-locked memory, where there is an accelerator to copy them to."""
    if accelerator() is None:
        return batches
    return [{key: value.pin_memory() for key, value in batch.items()} for batch in batches]


class RowLoader(Loader):
    """Global batches of shuffled rows. The state of a run is the number of its next row, so resuming costs nothing.

    Row number n of the run is at place n mod num_rows of epoch n div num_rows. An epoch's last rows share a batch with
    the next epoch's first ones: every row is read exactly once in each epoch. Where sources have weights
    (`JoinedRows.weights`), `Draws` says whose turn number n is, and each source counts its own rows and epochs.

    Args (and those of `Loader`):
        rows: The rows.
        seed: Epoch e's order depends on (seed, e) alone.
        workers: Processes that build batches ahead; 0: this one builds each batch when it is needed.
        lengths: (num_rows,) tokens of each row, where a batch is as wide as its longest row: a rank's share of a step
            is then cut into micro-batches of rows of similar length. Each rank still reads the same rows in a step.

    Raises:
        UserError: There are no rows.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        train_batch_size: int,
        seed: int,
        first: int = 0,
        workers: int = 0,
        ledger: Path | None = None,
        lengths: np.ndarray | None = None,
    ):
        if not len(rows):
            raise UserError("the corpus is too small: it has no row to train on", remedy="use more text")
        self.rows, self._lengths = rows, lengths
        self._num_workers, self._shape = workers, (0, 1, 1)
        self._workers: Workers | None = None
        self._joined = rows if isinstance(rows, JoinedRows) else None
        draws = None
        if self._joined and self._joined.weights is not None:
            draws = Draws(self._joined.weights)
            self._orders = [EpochOrder(len(part), (seed, s)) for s, part in enumerate(self._joined.parts)]
        else:
            self._orders = [EpochOrder(len(rows), (seed,))]
        super().__init__(rows.fingerprint, train_batch_size, seed, first, ledger, draws)

    def indices(self, step: int) -> np.ndarray:
        """Row numbers (train_batch_size,) of the global batch of a step, counted from 0."""
        return self._plan(step).rows

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> list[Batch]:
        """A rank's share of a step's global batch, cut into micro-batches.

        Ranks take consecutive shares, so any number of ranks reads the same rows in the same step.

        Raises:
            UserError: The global batch is not a multiple of world_size * micro_batch_size.
        """
        plans = self._share(step, rank, world_size, micro_batch_size)
        if self._num_workers:
            shape = (rank, world_size, micro_batch_size)
            if self._workers is None or shape != self._shape:
                self.close()
                self._shape = shape
                self._workers = Workers(self.rows, lambda step: self._share(step, *shape), self._num_workers)
            batches = self._workers.take(step)
        else:
            batches = pinned(build(self.rows, plans))
        self._has_read(step, rank, world_size)
        return batches

    def num_targets(self, step: int) -> int:
        """Positions with a target in the whole global batch: the divisor of a summed loss."""
        rows, epochs = self._plan(step)
        return sum(int(self.rows.num_targets(rows[epochs == e], e).sum()) for e in np.unique(epochs).tolist())

    def sample_ids(self, step: int, rank: int = 0, world_size: int = 1) -> list[str]:
        """Names `source:row` of a rank's share of a step, in the order in which they are read."""
        share = self.indices(step).reshape(world_size, -1)[rank].tolist()
        return [self._joined.label(index) if self._joined else f"train:{index}" for index in share]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._drop_built()

    def epochs(self, step: int) -> list[float]:
        """Epochs of each source (or of the whole) that have been read before `step`."""
        number = self._number(step)
        read = self._draws.counts(number).tolist() if self._draws else [number]
        return [count / order.size for count, order in zip(read, self._orders, strict=True)]

    def reweigh(self, weights: Sequence[float], step: int) -> None:
        super().reweigh(weights, step)
        self._drop_built()

    def close(self) -> None:
        """Ends the worker processes, if any."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _drop_built(self) -> None:
        if self._workers is not None and self._draws:  # without draws the order never changes
            self._workers.drop()

    def _share(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> list[Plan]:
        if self.train_batch_size % (world_size * micro_batch_size):
            raise UserError(
                "the global batch cannot be divided evenly among the ranks",
                wanted=f"train_batch_size a multiple of {world_size} ranks x {micro_batch_size} rows per micro-batch",
                got=self.train_batch_size,
            )
        own = self._plan(step).part(np.arange(self.train_batch_size).reshape(world_size, -1)[rank])
        if self._lengths is not None:
            own = own.part(np.argsort(self._lengths[own.rows], kind="stable"))
        return [own.part(some) for some in np.arange(len(own.rows)).reshape(-1, micro_batch_size)]

    def _plan(self, step: int) -> Plan:
        begin = self._number(step)
        if self._draws is None:
            return self._ordered(0, begin + np.arange(self.train_batch_size))
        assert self._joined is not None
        source, number = self._draws.draw(begin, self.train_batch_size)
        plan = Plan(np.zeros_like(number), np.zeros_like(number))
        for s in np.unique(source).tolist():
            mine = source == s
            own = self._ordered(s, number[mine])
            plan.rows[mine], plan.epochs[mine] = own.rows + self._joined.starts[s], own.epochs
        return plan

    def _ordered(self, source: int, numbers: np.ndarray) -> Plan:
        order = self._orders[source]
        epochs, places = np.divmod(numbers, order.size)
        rows = np.zeros_like(places)
        for epoch in np.unique(epochs).tolist():
            rows[epochs == epoch] = order.rows(places[epochs == epoch], epoch)
        return Plan(rows, epochs)


def held_out_batches(rows: Rows, batch_size: int, max_rows: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """A rank's batches of a fixed, evenly spread subset of at most `max_rows` rows.

    Every rank yields the same number of batches of the same shapes, because under ZeRO-3 a forward pass needs all
    ranks. Where the rows do not divide, places are filled with a row without targets: add up losses and targets over
    ranks and divide once; a rank's own mean may be 0 / 0.
    """
    assert batch_size >= 1 and max_rows >= 1 and 0 <= rank < world_size
    count = min(max_rows, len(rows))
    chosen = np.arange(count) * len(rows) // count
    places = np.arange(rank, -(-count // world_size) * world_size, world_size)
    for begin in range(0, len(places), batch_size):
        some = places[begin : begin + batch_size]
        batch = rows.batch(chosen[np.minimum(some, count - 1)])
        filled = torch.from_numpy(some >= count)
        batch["targets"][filled] = NO_TARGET
        if "choices" in batch:
            batch["choices"][filled] = NO_CHOICE
        yield batch
