"""CPM-Ant rows: documents cut into samples, samples packed into rows, rows turned into batches.

A row is a block of `prompt_length` prompt ids followed by `max_length - prompt_length` tokens. A sample is
`<s> piece </s>`, or `piece </s>` if the tokenizer does not begin texts with `<s>`. A row holds one or more samples, and
`span` numbers them from 0 so that attention, which needs span[q] == span[k], keeps them apart.

The prompt and spans. CPM-Live puts a prompt in front of every sample and packs the two together, so each sample of a
row sees a prompt of its own. The model reads prompt ids only in a row's first `prompt_length` positions; there is room
for one prompt, and it belongs to the row's first sample (span 0), exactly as the first sample's does in CPM-Live. Later
samples of a row see no prompt. Documents are therefore cut so that most pieces fill a row alone; only the ends of
documents and short documents share rows (see `share_without_prompt` in the statistics). The position bias depends on
distances inside a sample and is right for every sample.

The task is language modelling (task 2 in CPM-Live's numbering of prompts): the prompt is context, the text is not, so
text attends causally, and the target at position i is the token at i + 1 of the same sample.

Shapes: R rows, B rows of a batch, P prompt_length, T max_length - prompt_length, N samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cook.base.batches import Batch
from cook.base.errors import UserError
from cook.data.cache import whole_manifest
from cook.data.corpus import MIN_REST
from cook.data.reports import LeftOut

LM_TASK = 2
TEXT_SEGMENT = 2
NO_TARGET = -100
PADDING_SPAN = -1

MIN_PIECE = 8
"""Rows without room for a piece of this many tokens are refused."""

OPEN_ROWS = 1024
"""First fit looks at this many of the rows opened last: linear time, however large the corpus."""

_PIECES_AT_ONCE = 1 << 14  # bounds the memory of filling rows


class Pieces(NamedTuple):
    """Stretches of a flat token array, in document order (int64)."""

    begin_N: np.ndarray
    size_N: np.ndarray


class Places(NamedTuple):
    """Where each sample goes: its row, its first column in the row's text, its number in the row (int64)."""

    row_N: np.ndarray
    column_N: np.ndarray
    span_N: np.ndarray


def cut(offsets: np.ndarray, max_size: int) -> Pieces:
    """Cuts documents into pieces of `max_size` tokens (without what begins and ends a sample) and a rest.

    A rest shorter than `MIN_REST` is left out. A document that is shorter than a piece is a piece, however short it is.
    Document d is tokens offsets[d]:offsets[d + 1].
    """
    begins, lengths = np.asarray(offsets[:-1], np.int64), np.diff(np.asarray(offsets, np.int64))
    full, rest = np.divmod(lengths, max_size)
    keeps_rest = rest >= np.where(full > 0, MIN_REST, 1)
    counts = full + keeps_rest
    document_N = np.repeat(np.arange(len(lengths)), counts)
    start_N = ordinals(counts) * max_size
    return Pieces(begins[document_N] + start_N, np.minimum(max_size, lengths[document_N] - start_N))


def ordinals(count_N: np.ndarray) -> np.ndarray:
    """0, 1, … count - 1 for every count, one after the other."""
    return np.arange(count_N.sum()) - np.repeat(np.cumsum(count_N) - count_N, count_N)


def first_fit(sizes_N: np.ndarray, row_size: int) -> Places:
    """Puts each sample into the first row with room for it, among the `OPEN_ROWS` shared rows opened last.

    A sample as large as a row has a row of its own. Rows are numbered in the order in which they are opened. Sizes
    include what begins and ends a sample; none is above `row_size`, the tokens in a row without the prompt.
    """
    places = Places(*np.zeros((3, len(sizes_N)), np.int64))
    free, count, number = np.zeros((3, int((sizes_N < row_size).sum())), np.int64)
    opened = num_rows = 0
    for sample, size in enumerate(sizes_N.tolist()):
        if size == row_size:
            places.row_N[sample] = num_rows
            num_rows += 1
            continue
        first = max(0, opened - OPEN_ROWS)
        fits = free[first:opened] >= size
        slot = first + int(fits.argmax()) if fits.any() else opened
        if slot == opened:
            free[slot], number[slot] = row_size, num_rows
            opened, num_rows = opened + 1, num_rows + 1
        places.row_N[sample] = number[slot]
        places.column_N[sample] = row_size - free[slot]
        places.span_N[sample] = count[slot]
        free[slot] -= size
        count[slot] += 1
    return places


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Rows in compact form, usually memory-mapped; batches are built on the fly."""

    tokens_RT: np.ndarray  # int32, with what begins and ends samples, 0 after the last sample
    spans_RT: np.ndarray  # int16, the sample's number in its row, -1 after the last sample
    lengths: np.ndarray  # int32 (R,), used positions of each row, prompt included
    targets_R: np.ndarray  # int32, positions of each row that have a target
    prompt_length: int  # P, prompt positions in front of the text
    fingerprint: str  # of everything that the rows depend on; a resumed run compares it with that of its start
    origin: tuple[Path, str, int] | None = None
    """Arguments of `open_rows` for rows that are mapped from files: a worker process maps them again."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> Any:
        return (open_rows, self.origin) if self.origin else super().__reduce__()

    @property
    def max_length(self) -> int:
        """Positions of a row, prompt included."""
        return self.prompt_length + self.tokens_RT.shape[1]

    @property
    def is_redrawn(self) -> bool:
        """No: every epoch has the same targets."""
        return False

    def num_targets(self, indices: np.ndarray, epoch: int = 0) -> np.ndarray:
        return self.targets_R[indices].astype(np.int64)

    def batch(self, indices: np.ndarray, epoch: int = 0) -> Batch:
        """As `Rows.batch`, L = P + T."""
        tokens_BT = np.asarray(self.tokens_RT[indices], dtype=np.int64)
        span_BT = np.asarray(self.spans_RT[indices], dtype=np.int64)
        num, prompt = len(tokens_BT), self.prompt_length
        is_text_BT = span_BT != PADDING_SPAN

        continues_BT = np.zeros_like(is_text_BT)  # the next position belongs to the same sample
        continues_BT[:, :-1] = is_text_BT[:, 1:] & (span_BT[:, 1:] == span_BT[:, :-1])
        next_BT = np.roll(tokens_BT, -1, axis=1)
        column_T = np.arange(tokens_BT.shape[1])
        begins_BT = np.concatenate([np.ones((num, 1), bool), span_BT[:, 1:] != span_BT[:, :-1]], axis=1)
        start_BT = np.maximum.accumulate(np.where(begins_BT, column_T, 0), axis=1)

        def row(prompt_P: np.ndarray | int, text_BT: np.ndarray) -> torch.Tensor:
            front_BP = np.broadcast_to(np.asarray(prompt_P, dtype=text_BT.dtype), (num, prompt))
            return torch.from_numpy(np.concatenate([front_BP, text_BT], axis=1))

        return {
            "input": row(np.arange(prompt) + prompt * LM_TASK, tokens_BT),
            "length": torch.from_numpy(np.asarray(self.lengths[indices], dtype=np.int64)),
            "context": row(1, np.zeros_like(is_text_BT)),
            "position": row(np.arange(prompt), np.where(is_text_BT, prompt + column_T - start_BT, 0)),
            "segment": row(0, np.where(is_text_BT, TEXT_SEGMENT, 0)),
            "span": row(0, span_BT),
            "targets": row(NO_TARGET, np.where(continues_BT, next_BT, NO_TARGET)),
        }


def text_capacity(max_length: int, prompt_length: int) -> int:
    """Tokens of the largest piece in a row; a `UserError` if there is no room for `MIN_PIECE` of them."""
    capacity = max_length - prompt_length - 2
    if capacity < MIN_PIECE:
        raise UserError(
            "data.max_length leaves too little room after the prompt",
            wanted=f"at least {prompt_length + 2 + MIN_PIECE} with a prompt of {prompt_length}",
            got=max_length,
        )
    return capacity


def pack(
    tokens: np.ndarray,
    offsets: np.ndarray,
    *,
    row_size: int,
    start_id: int | None,
    eos_id: int,
    array: Callable[[str, type, tuple[int, ...]], np.ndarray],
) -> dict[str, Any]:
    """Cuts and packs documents and fills the rows' arrays.

    Args:
        tokens: Flat ids of all documents.
        offsets: (num_documents + 1,) document borders in `tokens`.
        row_size: T, tokens in a row without the prompt.
        start_id: `<s>`; None if samples begin with the text.
        eos_id: `</s>`.
        array: Makes the array of a name, type and shape; not called where there is no row.

    Returns:
        Statistics: rows, samples, short (documents shorter than a row), targets, filled (share of T in use),
        share_without_prompt (share of the targets in samples that are not their row's first), and left_out (a record of
        `LeftOut`).
    """
    ends = 1 + (start_id is not None)
    pieces = cut(offsets, row_size - ends)
    sizes_N = pieces.size_N + ends
    places = first_fit(sizes_N, row_size)
    num_rows = int(places.row_N.max(initial=-1)) + 1
    if num_rows:
        tokens_RT = array("tokens", np.int32, (num_rows, row_size))
        spans_RT = array("spans", np.int16, (num_rows, row_size))
        spans_RT[:] = PADDING_SPAN
        for begin in range(0, len(sizes_N), _PIECES_AT_ONCE):
            some = slice(begin, begin + _PIECES_AT_ONCE)
            _fill(tokens_RT, spans_RT, tokens, pieces, places, some, start_id, eos_id)
        array("used", np.int32, (num_rows,))[:] = np.bincount(places.row_N, sizes_N, num_rows)
        array("num_targets", np.int32, (num_rows,))[:] = np.bincount(places.row_N, sizes_N - 1, num_rows)
    num_targets = int((sizes_N - 1).sum())
    left_out = LeftOut()
    lengths_D = np.diff(offsets)
    left_out.add("empty documents", int((lengths_D == 0).sum()))
    left_out.add(
        f"tokens at the ends of long documents, fewer than {MIN_REST} of each", len(tokens) - int(pieces.size_N.sum())
    )
    return {
        "rows": num_rows,
        "samples": len(sizes_N),
        "short": int(((lengths_D > 0) & (lengths_D < row_size - ends)).sum()),
        "targets": num_targets,
        "filled": float(sizes_N.sum() / max(num_rows * row_size, 1)),
        "share_without_prompt": float((sizes_N - 1)[places.span_N > 0].sum() / max(num_targets, 1)),
        "left_out": left_out.record(),
    }


def pack_to_folder(
    tokens: np.ndarray,
    offsets: np.ndarray,
    *,
    row_size: int,
    start_id: int | None,
    eos_id: int,
    folder: Path,
    part: str,
) -> dict[str, Any]:
    """`pack` into files `<part>.*.npy`, `train` or `held_out`, that `open_rows` maps."""

    def array(name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        return new_array(folder / f"{part}.{name}.npy", dtype, shape)

    return pack(tokens, offsets, row_size=row_size, start_id=start_id, eos_id=eos_id, array=array)


def new_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A mapped `.npy` file of zeros whose space on the disk is reserved; an `OSError` if there is none.

    In a file with holes, a write through the map would kill the process when the disk is full.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with open(path, "rb+") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def pack_in_memory(
    tokens: np.ndarray,
    offsets: np.ndarray,
    *,
    max_length: int,
    prompt_length: int,
    start_id: int | None,
    eos_id: int,
    left_out: LeftOut | None = None,
) -> PackedRows | None:
    """`pack` into memory, adding up what is left out; None if all documents are empty."""
    made: dict[str, np.ndarray] = {}

    def array(name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        return made.setdefault(name, np.zeros(shape, dtype))

    row_size = max_length - prompt_length
    statistics = pack(tokens, offsets, row_size=row_size, start_id=start_id, eos_id=eos_id, array=array)
    if left_out is not None:
        left_out.include(statistics["left_out"])
    if not made:
        return None
    return PackedRows(
        tokens_RT=made["tokens"],
        spans_RT=made["spans"],
        lengths=made["used"] + np.int32(prompt_length),
        targets_R=made["num_targets"],
        prompt_length=prompt_length,
        fingerprint="",
    )


def open_rows(folder: Path, part: str, prompt_length: int) -> PackedRows:
    """Maps the rows that `pack_to_folder` wrote into a cached folder."""
    manifest = whole_manifest(folder)

    def load(name: str, mode: Any = None) -> np.ndarray:
        return np.load(folder / f"{part}.{name}.npy", mmap_mode=mode)

    return PackedRows(
        tokens_RT=load("tokens", "r"),
        spans_RT=load("spans", "r"),
        lengths=load("used") + np.int32(prompt_length),
        targets_R=load("num_targets"),
        prompt_length=prompt_length,
        fingerprint=manifest["fingerprint"],
        origin=(folder, part, prompt_length),
    )


def _fill(
    tokens_RT: np.ndarray,
    spans_RT: np.ndarray,
    tokens: np.ndarray,
    pieces: Pieces,
    places: Places,
    some: slice,
    start_id: int | None,
    eos_id: int,
) -> None:
    """Writes some samples into their rows, all tokens of all samples at once."""
    begin_N, size_N = pieces.begin_N[some], pieces.size_N[some]
    row_N, column_N, span_N = (array[some] for array in places)
    lead = int(start_id is not None)
    if start_id is not None:
        tokens_RT[row_N, column_N] = start_id
    tokens_RT[row_N, column_N + lead + size_N] = eos_id
    ordinal, whole_N = ordinals(size_N), lead + size_N + 1
    text = tokens[np.repeat(begin_N, size_N) + ordinal]
    tokens_RT[np.repeat(row_N, size_N), np.repeat(column_N + lead, size_N) + ordinal] = text
    spans_RT[np.repeat(row_N, whole_N), np.repeat(column_N, whole_N) + ordinals(whole_N)] = np.repeat(span_N, whole_N)
