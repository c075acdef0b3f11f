"""Tokenised rows with a target each, for fine-tuning an encoder: classification, regression, answer spans."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cook.data.benchmarks.glue import GlueRow, GlueTask
from cook.data.reports import LeftOut


class TokenRows:
    """Rows of different lengths, stored flat; a batch is as wide as its longest row.

    Args:
        ids: Token ids of every row, special tokens included.
        segments: Token types of every row: 0 for the first text, 1 for the second.
        targets_R: (R,) class ids (int64) or scores (float32), or (R, 2) first and last token (int64).
        pad_id: The id of padding.
    """

    def __init__(
        self, ids: Sequence[Sequence[int]], segments: Sequence[Sequence[int]], targets_R: np.ndarray, *, pad_id: int
    ):
        assert len(ids) == len(segments) == len(targets_R)
        self._offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
        self._ids = np.concatenate([np.asarray(row, np.int32) for row in ids] or [np.zeros(0, np.int32)])
        self._segments = np.concatenate([np.asarray(row, np.int8) for row in segments] or [np.zeros(0, np.int8)])
        self.targets_R, self._pad_id = targets_R, pad_id

    def __len__(self) -> int:
        return len(self.targets_R)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self._offsets)

    @property
    def fingerprint(self) -> str:
        """Hash of all rows."""
        digest = hashlib.sha256()
        for array in (self._offsets, self._ids, self._segments, np.ascontiguousarray(self.targets_R)):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max(initial=1))

    @property
    def largest_id(self) -> int:
        """The largest token id, that of padding included."""
        return int(self._ids.max(initial=self._pad_id))

    @property
    def largest_segment(self) -> int:
        """The largest token type."""
        return int(self._segments.max(initial=0))

    @property
    def is_redrawn(self) -> bool:
        """No: every epoch has the same targets."""
        return False

    def num_targets(self, indices: np.ndarray, epoch: int = 0) -> np.ndarray:
        """One per row: a loss is summed over rows and divided by their number."""
        return np.ones(len(indices), np.int64)

    def batch(self, indices: np.ndarray, epoch: int = 0) -> dict[str, torch.Tensor]:
        """The model's inputs (B, T), T the longest of these rows, `targets`, and `rows`: the rows' numbers."""
        width = max(1, int(self.lengths[indices].max(initial=1)))
        ids = np.full((len(indices), width), self._pad_id, np.int64)
        segments, mask = np.zeros((2, len(indices), width), np.int64)
        for row, index in enumerate(indices):
            begin, end = self._offsets[index : index + 2]
            ids[row, : end - begin] = self._ids[begin:end]
            segments[row, : end - begin] = self._segments[begin:end]
            mask[row, : end - begin] = 1
        named = {"input_ids": ids, "token_type_ids": segments, "attention_mask": mask}
        named |= {"targets": self.targets_R[indices], "rows": np.asarray(indices, np.int64)}
        return {name: torch.from_numpy(array) for name, array in named.items()}


def glue_rows(task: GlueTask, rows: Sequence[GlueRow], tokenizer: Any, max_length: int, left_out: LeftOut) -> TokenRows:
    """Tokenises a task's rows of at most `max_length` tokens, special ones included, with a fast tokenizer.

    Of a pair that is too long, the longer text is cut first, as BERT's own reader does. `left_out` counts cut rows.
    """
    first = [row.first for row in rows]
    second = [row.second or "" for row in rows] if len(task.texts) > 1 else None
    made = tokenizer(first, second, truncation=True, max_length=max_length, return_token_type_ids=True)
    left_out.add(f"ends of rows longer than {max_length} tokens", sum(bool(row.overflowing) for row in made.encodings))
    kind = np.int64 if task.labels else np.float32
    targets = np.array([row.target for row in rows]).astype(kind)
    return TokenRows(made["input_ids"], made["token_type_ids"], targets, pad_id=tokenizer.pad_token_id)


def ordered_batches(rows: TokenRows, batch_size: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """Row numbers of one rank's batches for an evaluation: rows of similar length together, every row on one rank once.

    All ranks get equally many batches, because under ZeRO-3 a forward pass needs all of them; a rank without further
    rows repeats the first one.
    """
    order = np.argsort(rows.lengths, kind="stable")
    rounds = -(-len(order) // (batch_size * world_size))
    for number in range(rounds):
        begin = (number * world_size + rank) * batch_size
        yield order[begin : begin + batch_size] if begin < len(order) else order[:1]
