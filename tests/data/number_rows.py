"""Rows that carry their own number as their only token, and a process that reads them until it is killed.

Started as a script, it reads steps of the rows, notes them in a ledger and saves the loader's state after each:
`python … number_rows.py FOLDER WORKERS`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cook.base.files import write_json
from cook.data.loader import RowLoader
from cook.data.packing import PackedRows
from cook.data.rows import JoinedRows

BATCH = 8
STEPS = 30


def rows_of(count, start=0):
    """Rows `<s> number </s>`, prompt of 1; the numbers begin at `start`, and row n has n targets."""
    own = start + np.arange(count)
    return PackedRows(
        tokens_RT=np.stack([np.full(count, 2), 10 + own, np.full(count, 3)], axis=1).astype(np.int32),
        spans_RT=np.zeros((count, 3), np.int16),
        lengths=np.full(count, 4, np.int32),
        targets_R=own.astype(np.int32),
        prompt_length=1,
        fingerprint="f",
    )


def numbers(batches):
    """The numbers that the rows of some batches carry."""
    return [int(n) - 10 for batch in batches for n in batch["input"][:, 2]]


def sources(weights=(3, 1)):
    """Two sources of 50 and 7 numbers; the small one is exhausted often."""
    return JoinedRows(["large", "small"], [rows_of(50), rows_of(7, start=100)], weights)


def loader_of(rows=None, **options):
    """A loader in the middle of a run."""
    return RowLoader(rows or rows_of(41), **({"train_batch_size": BATCH, "seed": 4} | options))


def read(loader, steps, world_size=1, micro_batch_size=2):
    """The numbers of each step's global batch, read by all ranks in turn."""
    return [
        [n for rank in range(world_size) for n in numbers(loader.micro_batches(s, rank, world_size, micro_batch_size))]
        for s in steps
    ]


def main() -> None:
    folder, workers = Path(sys.argv[1]), int(sys.argv[2])
    loader = loader_of(sources(), workers=workers, ledger=folder)
    for step in range(STEPS):
        if step == 9:
            loader.reweigh([1, 1], step)
        loader.micro_batches(step, 0, 1, 4)
        write_json(folder / "state.json", loader.state_dict())
        print(json.dumps(step), flush=True)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
