"""The largest micro-batch that fits in memory, for `training.micro_batch_size: "auto"`.

A stage begins with a rank's whole share of the batch. At ZeRO 0 to 2 every rank then tries one forward and backward
pass on its own: without communication, and without a change to weights, gradients or random numbers. If memory does not
suffice on any rank, all ranks build the engine again for half as many rows.

At ZeRO 3 a pass needs all ranks, and one that stops leaves the others waiting in a collective, so nothing is tried. A
rank that runs out of memory ends the run instead, as it does in any later step, and so does a system that kills the
process. The stage's folder says what was being tried: a size is recorded before it is used, and as good once it has
worked. The next start continues with half of a size that is not recorded as good. Everything resumes from the last
checkpoint, so no step is half applied, and the global batch is the same for any size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cook.base import distributed
from cook.base.batches import divisors
from cook.base.distributed import on_all_ranks, on_first_rank, say
from cook.base.errors import RunFailed, UserError, out_of_memory
from cook.base.files import read_json, write_json
from cook.base.seeds import restore_rng_state, rng_state
from cook.config.types import TrainingConfig

RECORD = "micro_batch.json"


class MicroBatch:
    """The search of one stage; all ranks make it and call it together.

    Args:
        folder: The stage's folder, where the choice is kept.
        training: The stage's training section.
        layout: What memory depends on besides: the ZeRO stage, the precision.
    """

    def __init__(self, folder: Path, training: TrainingConfig, layout: Mapping[str, Any]):
        world = distributed.world_size()
        self._file = folder / RECORD
        self._share = training.train_batch_size // world
        self._setup = {
            "ranks": world,
            "train_batch_size": training.train_batch_size,
            "activation_checkpointing": training.activation_checkpointing,
            **layout,
        }
        self.rows = self._share
        """Rows per micro-batch."""
        self.is_good = False
        """Whether this size has worked."""
        record = on_first_rank(lambda: read_json(self._file) if self._file.exists() else {})
        if record.get("setup") == self._setup:
            self.rows, self.is_good = record["rows"], record["good"]
            if not self.is_good:
                self._halve("had not been completed when the last run ended")
        if not self.is_good:
            self._note()

    def fits(self, tried: Callable[[], object]) -> bool:
        """Runs `tried` on every rank; if memory does not suffice on any rank, the size is halved on all.

        Raises:
            UserError: not even one row fits.
        """

        def attempt() -> bool:
            try:
                tried()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                return True  # the error's frames hold the pass's tensors, until it is gone
            return False

        state = rng_state()
        failed = on_all_ranks(attempt)
        restore_rng_state(state)
        ranks = [str(rank) for rank, has_failed in enumerate(distributed.gather(failed)) if has_failed]
        if ranks:
            gc.collect()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            self._halve(f"does not fit in the memory of rank {', '.join(ranks)}")
            self._note()
            return False
        self.works()
        return True

    def works(self) -> None:
        """Records that the present size has worked."""
        if not self.is_good:
            self.is_good = True
            self._note()

    def failure(self) -> RunFailed:
        """Called on a rank that runs out of memory later, alone: has the next start use half as many rows."""
        write_json(self._file, {"setup": self._setup, "rows": self.rows, "good": False})
        return RunFailed(
            f"out of memory with micro-batches of {self.rows} row(s)\n"
            "  Everything saved before is intact.\n"
            "  remedy: run the same command again: it continues with smaller micro-batches and the same batch"
        )

    def _halve(self, why: str) -> None:
        before = self.rows
        if before == 1:
            raise UserError(
                f"a micro-batch of one row {why}",
                remedy='use more ranks, a higher ZeRO stage, "activation_checkpointing": true or shorter rows '
                f"(data.max_length), then remove {self._file}",
            )
        self.rows = max(n for n in divisors(self._share) if n <= before // 2)
        say(f"{self._file.parent.name}: a micro-batch of {before} rows {why}; trying {self.rows}")

    def _note(self) -> None:
        record = {"setup": self._setup, "rows": self.rows, "good": self.is_good}
        on_first_rank(lambda: write_json(self._file, record))
