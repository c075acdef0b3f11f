"""Rows of CPM-Ant's tasks: records are packed into rows once; what is hidden in them is drawn every epoch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cook.base.errors import UserError
from cook.data.cache import whole_manifest
from cook.data.cpm_live.dataset import LiveDataset
from cook.data.cpm_tasks.batches import MAX_SEGMENT, build_batch, epoch_key, ordinals, segments_of, targets_by_segment
from cook.data.packing import first_fit

MODEL_KEYS = ("input", "length", "context", "position", "segment", "span", "targets")
_RECORDS_AT_ONCE = 1 << 20


class TaskRows:
    """Packed rows over the records of a `LiveDataset`; follows `cook.data.rows.Rows`.

    Every sample has a prompt of its own in front, chosen by its record's task, and a span of its own.

    Args:
        data: The records.
        folder: Written by `pack_records`.
        part: Of the folder.
        seed: Of all batches.
        choice_token: If there are questions with options: the id whose logit at an option's end is its score.
    """

    def __init__(self, data: LiveDataset, folder: Path, part: str, *, seed: int, choice_token: int | None = None):
        manifest = whole_manifest(folder)
        self._data, self._folder, self._part, self._seed, self._choice_token = data, folder, part, seed, choice_token
        self._begin_R = np.asarray(np.load(folder / f"{part}.begin.npy", mmap_mode="r"))
        self._record_N = np.asarray(np.load(folder / f"{part}.record.npy", mmap_mode="r"))
        self._prompt_length: int = manifest["prompt_length"]
        self.max_length: int = manifest["max_length"]
        self.fingerprint: str = manifest["fingerprint"]  # of the records' content and of how they were packed
        self.is_redrawn = True  # what is hidden in a sample is drawn anew in every epoch

    def __reduce__(self) -> tuple:
        options: dict[str, Any] = {"seed": self._seed, "choice_token": self._choice_token}
        return partial(TaskRows, **options), (self._data, self._folder, self._part)

    def __len__(self) -> int:
        return len(self._begin_R) - 1

    def records(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The records of some rows, in order, and the position in `indices` of the row of each: int64 (N,) both."""
        begin_B = np.asarray(self._begin_R[indices])
        count_B = np.asarray(self._begin_R[np.asarray(indices) + 1]) - begin_B
        row_N = np.repeat(np.arange(len(begin_B)), count_B)
        return np.asarray(self._record_N[begin_B[row_N] + ordinals(count_B)]), row_N

    def batch(self, indices: np.ndarray, epoch: int = 0) -> dict[str, torch.Tensor]:
        """As `Rows.batch`; if there are questions with options, with two keys for `cook.data.token_loss`.

        They are `choices` int64 (B, L), see `build_batch`, and `choice_token` int64 (B,).
        """
        record_N, row_N = self.records(indices)
        arrays = build_batch(
            self._data,
            record_N,
            row_N,
            num_rows=len(indices),
            max_length=self.max_length,
            prompt_length=self._prompt_length,
            key=epoch_key(self._seed, epoch),
        )
        batch = {name: torch.from_numpy(arrays[name]) for name in MODEL_KEYS}
        if self._choice_token is not None:
            batch["choices"] = torch.from_numpy(arrays["choices"])
            batch["choice_token"] = torch.full((len(indices),), self._choice_token)
        return batch

    def num_targets(self, indices: np.ndarray, epoch: int = 0) -> np.ndarray:
        record_N, row_N = self.records(indices)
        segments = segments_of(self._data, record_N)
        count_S = targets_by_segment(segments, epoch_key(self._seed, epoch))
        return np.bincount(row_N[segments.owner_S], count_S, len(indices)).astype(np.int64)


def pack_records(
    data: LiveDataset, record_N: np.ndarray, *, max_length: int, prompt_length: int, folder: Path, part: str
) -> dict[str, Any]:
    """Packs the records of rising numbers `record_N` into rows, first fit, and writes the rows as `<part>.*.npy`.

    Returns:
        Statistics: rows, samples, tokens, filled (share of the positions in use).

    Raises:
        UserError: A record does not fit into a row.
    """
    begins = range(0, len(record_N), _RECORDS_AT_ONCE)
    sizes = [_sizes(data, record_N[begin : begin + _RECORDS_AT_ONCE], prompt_length) for begin in begins]
    size_N = np.concatenate([*sizes, np.zeros(0, np.int64)])
    long_N = np.flatnonzero(size_N > max_length)
    if len(long_N):
        longest = int(long_N[size_N[long_N].argmax()])
        raise UserError(
            f"{len(long_N)} of {len(record_N)} records do not fit into a row; "
            f"the longest is at {data.place(int(record_N[longest]))}",
            wanted=f"at most {max_length} positions, prompt included",
            got=int(size_N[longest]),
            remedy=f"set data.max_length to {int(size_N[longest])}, or cut the records shorter (cook data)",
        )
    places = first_fit(size_N, max_length)
    num_rows = int(places.row_N.max(initial=-1)) + 1
    order_N = np.argsort(places.row_N, kind="stable")
    counts = np.bincount(places.row_N, minlength=num_rows)
    np.save(folder / f"{part}.begin.npy", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    np.save(folder / f"{part}.record.npy", np.asarray(record_N, np.int64)[order_N])
    return {
        "rows": num_rows,
        "samples": len(record_N),
        "tokens": int(data.column["tokens"][record_N].sum(dtype=np.int64)),
        "filled": float(size_N.sum() / max(num_rows * max_length, 1)),
    }


def _sizes(data: LiveDataset, record_N: np.ndarray, prompt_length: int) -> np.ndarray:
    """Positions that each record takes, its prompts included: int64 (N,)."""
    segments = segments_of(data, record_N)
    if segments.length_S.max(initial=0) >= MAX_SEGMENT:
        number = int(record_N[segments.owner_S[segments.length_S.argmax()]])
        raise UserError(f"{data.place(number)}: the segment is too long", wanted=f"below {MAX_SEGMENT} tokens")
    whole_S = segments.length_S + prompt_length * segments.begins_S
    return np.bincount(segments.owner_S, whole_S, len(record_N)).astype(np.int64)
