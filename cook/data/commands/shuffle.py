"""The same records in a random order, for data of any size.

Every record gets a random key from the seed and its number. Records go into buckets by their keys, on the disk; then
each bucket is sorted in memory and written. The order depends on the seed alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from cook.base.errors import UserError
from cook.base.seeds import derived_seed
from cook.data.commands import common
from cook.data.cpm_live.meta import read_meta
from cook.data.cpm_tasks.draws import mix
from cook.data.progress import Progress

MAX_BUCKETS = 512
"""Files that are open at once."""


def shuffle(source: Path, output: Path, *, seed: int, memory: int) -> None:
    """Writes the records of `source` to a new folder in the order of a seed, with about `memory` bytes of memory.

    Raises:
        UserError: the source is not binary data, the output is not empty, or the memory too small.
    """
    meta = read_meta(source)
    total = sum(file.nbytes for file in meta.shown)
    buckets = 1
    while total / buckets > memory / 2:  # sorting copies a bucket
        buckets *= 2
    if buckets > MAX_BUCKETS:
        least = f"{-(-2 * total // MAX_BUCKETS >> 20)}M"
        raise UserError("--memory is too small for this data", wanted=f"at least {least}", got=memory)
    folder = common.new_folder(output)
    aside = folder / ".buckets"
    aside.mkdir()
    block_size = meta.files[0].block_size
    assert block_size is not None
    try:
        with Progress("shuffling", 2 * total, unit="MB", scale=1e6) as progress:
            sizes = _deal(common.all_numbers(meta, progress), aside, buckets, seed)
            shuffled = _sorted(aside, sizes, progress)
            infos = common.write_folder(folder, shuffled, version=meta.version, block_size=block_size)
    except BaseException:
        for path in folder.glob("data-*"):
            path.unlink()
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    count = sum(info.nlines for info in infos)
    print(f"{folder}: {count} records in {len(infos)} file(s), in the order of seed {seed}")


def _deal(records: Iterator[np.ndarray], aside: Path, buckets: int, seed: int) -> list[list[tuple[int, int]]]:
    """Writes every record into the file of its bucket; returns the (key, number of values) of each in it."""
    base, shift = np.uint64(derived_seed(seed, "shuffle")), 64 - (buckets - 1).bit_length()
    sizes: list[list[tuple[int, int]]] = [[] for _ in range(buckets)]
    with ExitStack() as stack:
        files = [stack.enter_context(open(aside / str(number), "wb")) for number in range(buckets)]
        for number, values in enumerate(records):
            key = int(mix(mix(base + np.array([number], np.uint64)))[0])
            bucket = key >> shift
            files[bucket].write(values.tobytes())
            sizes[bucket].append((key, len(values)))
    return sizes


def _sorted(aside: Path, sizes: list[list[tuple[int, int]]], progress: Progress) -> Iterator[np.ndarray]:
    for bucket, entries in enumerate(sizes):
        values = np.fromfile(aside / str(bucket), np.int64)
        begins = np.cumsum([0, *(size for _, size in entries)])
        for _, index in sorted((key, index) for index, (key, _) in enumerate(entries)):
            progress.advance(8 * entries[index][1])
            yield values[begins[index] : begins[index + 1]]
        (aside / str(bucket)).unlink()
