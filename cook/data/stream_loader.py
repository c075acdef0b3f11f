"""The loader of streamed data: the interface of `RowLoader`, with steps in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cook.base import distributed
from cook.base.batches import Batch
from cook.base.errors import UserError
from cook.data.loader import Loader, pinned
from cook.data.order import Draws
from cook.data.packing import PackedRows
from cook.data.reports import LeftOut
from cook.data.rows import merged
from cook.data.streams import StreamedData, StreamReader, num_streams

Row = tuple[PackedRows, int, str]


class StreamLoader(Loader):
    """Global batches of streamed rows; steps are read in order, from the one in the state.

    Args (and those of `Loader`):
        data: The sources.
        seed: Of the order of files and of the rows in a block.
        first: Only weights depend on it; the sources' places are in the state.
        rank: This rank; it reads the streams that its share of a batch needs.
        world_size: Number of ranks.
        gather: Every rank's value, in the order of the ranks; a collective.
    """

    def __init__(
        self,
        data: StreamedData,
        *,
        train_batch_size: int,
        seed: int,
        first: int = 0,
        rank: int = 0,
        world_size: int = 1,
        gather: Callable[[Any], list[Any]] = distributed.gather,
        ledger: Path | None = None,
    ):
        if train_batch_size % world_size:
            raise UserError(
                "the global batch does not divide among the ranks",
                wanted=f"a multiple of {world_size}",
                got=train_batch_size,
            )
        super().__init__(data.fingerprint, train_batch_size, seed, first, ledger, Draws(data.weights))
        self.rows, self._rank, self._world_size, self._gather = data, rank, world_size, gather
        # A batch smaller than the number of streams would leave some unread.
        self._parts = [min(num_streams(source), train_batch_size) for source in data.sources]
        self._states: dict[str, dict[str, Any]] = {}
        self._readers: dict[str, StreamReader] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._read_step: int | None = None
        self._share: list[Row] = []
        self._told: dict[str, Any] = {}
        self._targets = 0

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> list[Batch]:
        """As `RowLoader.micro_batches`, for this loader's own rank."""
        assert (rank, world_size) == (self._rank, self._world_size), "a stream is opened for one rank"
        self._read(step)
        if len(self._share) % micro_batch_size:
            raise UserError(
                "a rank's share of the batch cannot be divided into whole micro-batches",
                wanted=f"a multiple of {micro_batch_size}",
                got=len(self._share),
            )
        groups = [self._share[b : b + micro_batch_size] for b in range(0, len(self._share), micro_batch_size)]
        batches = pinned([_batch(group) for group in groups])
        self._has_read(step, rank, world_size)
        return batches

    def num_targets(self, step: int) -> int:
        """Positions with a target in the whole global batch. A collective: no rank knows the others' rows."""
        if self._read(step):
            own = sum(int(rows.targets_R[row]) for rows, row, _ in self._share)
            self._targets = sum(self._gather(own))
        return self._targets

    def sample_ids(self, step: int, rank: int = 0, world_size: int = 1) -> list[str]:
        """Names `source.stream:epoch.block.row` of this rank's share of the step that was read last."""
        return [name for _, _, name in self._share] if step == self._read_step else []

    def state_dict(self) -> dict[str, Any]:
        """As `Loader.state_dict`, with the place in every stream: the same on all ranks. A collective, between steps.

        Reports what has been left out so far.
        """
        mine = {key: (reader.state(), reader.left_out) for key, reader in self._readers.items()}
        places, left_out = dict(self._states), LeftOut()
        for theirs in self._gather(mine):
            places |= {key: state for key, (state, _) in theirs.items()}
            for _, record in theirs.values():
                left_out.include(record)
        if left_out.record() != self._told:
            self._told = left_out.record()
            for sentence in left_out.sentences("what was streamed in this epoch"):
                distributed.say(sentence)
        return super().state_dict() | {"parts": self._parts, "streams": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Loader.load_state_dict`; each stream reads one block again.

        Raises:
            UserError: the batch is smaller than the number of streams in the state.
        """
        streams = max(state.get("parts", ()), default=0)
        if streams > self.train_batch_size and state.get("data") == self._fingerprint:
            raise UserError(
                "the batch is smaller than the number of streams that the run began with",
                wanted=f"train_batch_size of at least {streams}",
            )
        super().load_state_dict(state)
        self._parts, self._states, self._readers = list(state["parts"]), dict(state["streams"]), {}
        self._read_step = None

    def epochs(self, step: int) -> list[float]:
        """The epoch of each source that this rank is reading."""
        epochs = [0.0] * len(self._parts)
        for key, reader in self._readers.items():
            source = int(key.partition(".")[0])
            epochs[source] = max(epochs[source], float(reader.epoch))
        return epochs

    def close(self) -> None:
        """Ends the reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> bool:
        """Reads this rank's share of a step, once."""
        if step == self._read_step:
            return False
        assert step == self._next_step, f"a stream is read in order: step {step} asked for, {self._next_step} is next"
        batch, parts = self.train_batch_size, self._parts
        assert self._draws is not None
        source_B, _ = self._draws.draw(self._number(step), batch)
        keys = [_key(s, i * parts[s] // batch) for i, s in enumerate(source_B.tolist())]
        own = range(self._rank * batch // self._world_size, (self._rank + 1) * batch // self._world_size)
        # Ranks share a stream where their places meet: each of them reads the rows of all of them.
        mine = {_key(s, i * parts[s] // batch) for i in own for s in range(len(parts))}
        taken = {key: iter(self._reader(key).take(keys.count(key))) for key in sorted(mine & set(keys))}
        rows = {i: next(taken[key]) for i, key in enumerate(keys) if key in taken}
        self._share = [(rows[i][0].rows, *rows[i][1:]) for i in own]
        self._read_step = step
        return True

    def _reader(self, key: str) -> StreamReader:
        if key not in self._readers:
            source, part = map(int, key.split("."))
            reader = StreamReader(self.rows, source, part, self._parts[source], self.seed, self._pool)
            if key in self._states:
                reader.load(self._states[key])
            self._readers[key] = reader
        return self._readers[key]


def _key(source: int, part: int) -> str:
    return f"{source}.{part}"


def _batch(group: Sequence[Row]) -> Batch:
    """One batch of rows that lie in several blocks."""
    blocks = {id(rows): rows for rows, _, _ in group}
    parts = []
    for key, rows in blocks.items():
        places = np.array([i for i, row in enumerate(group) if id(row[0]) == key])
        parts.append((places, rows.batch(np.array([group[i][1] for i in places]))))
    return merged(parts)
