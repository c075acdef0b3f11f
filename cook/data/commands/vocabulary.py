"""Counts the tokens of texts, and proposes which ones a model for such texts needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cook.data.commands.pieces import texts_of
from cook.data.corpus import grouped
from cook.data.reports import LeftOut
from cook.text.tokenizer import Tokenizer


def count_tokens(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """How often each token occurs, int64 `[vocab_size]`."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for some in grouped(texts, len):
        for ids in tokenizer.encode_batch(some):
            counts += np.bincount(ids, minlength=len(counts))
    return counts


def count_inputs(
    inputs: Sequence[str], tokenizer: Tokenizer, *, format: str | None, text_field: str, say: bool = True
) -> np.ndarray:
    """`count_tokens` of files, folders or glob patterns; with `say`, prints what was left out.

    Raises:
        UserError: there is no text to read.
    """
    left_out = LeftOut()
    texts = texts_of(inputs, format=format, text_field=text_field, left_out=left_out, doing="counting")
    counts = count_tokens(texts, tokenizer)
    for sentence in left_out.sentences("the input") if say else ():
        print(sentence)
    return counts


def proposals(
    counts: np.ndarray, complete: Callable[[list[int]], Sequence[int]], least: Sequence[int]
) -> list[dict[str, Any]]:
    """What stays if every token with at least `min_count` occurrences does.

    Args:
        counts: From `count_tokens`.
        complete: All ids that stay with some, as `cook.text.smaller.completed`.
        least: Values of `min_count`.

    Returns:
        `min_count`, `tokens` that stay, and the share of the counted tokens that they are, `covered`, per value.
    """
    rows = []
    for count in least:
        kept = np.asarray(complete(np.flatnonzero(counts >= count).tolist()))
        rows.append(
            {"min_count": count, "tokens": len(kept), "covered": float(counts[kept].sum() / max(1, counts.sum()))}
        )
    return rows
