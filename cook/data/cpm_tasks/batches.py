"""From records to the model's batch, as CPM-Ant builds it: prompts, segments, spans, hidden tokens, targets.

All samples of a batch are built at once. Shapes: B rows of L positions, P prompt positions per sample, N records,
S segments, T tokens of all records.

Random numbers have names: every segment's draw is a function of (seed, epoch, record, segment) and of nothing else. It
comes from a counter and a mixing function, so its cost does not depend on earlier draws or the rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cook.base.seeds import derived_seed
from cook.data.cpm_live.dataset import LiveDataset
from cook.data.cpm_live.records import GENERATE, LM, MASKED_LM, RIGHT_CHOICE, TOLD, TOLD_WITH_TYPE, WRONG_CHOICE
from cook.data.order import mix
from cook.data.packing import NO_TARGET, PADDING_SPAN, ordinals

NO_CHOICE = -1
GOLDEN = 0x9E3779B97F4A7C15
_POSITION_BITS, _KEY_BITS = 20, 28
MAX_SEGMENT = 1 << _POSITION_BITS
"""Tokens of the longest segment whose parts can be drawn."""

_AT_ONCE = 1 << (64 - _POSITION_BITS - _KEY_BITS)


def epoch_key(seed: int, epoch: int) -> int:
    """The start of an epoch's draws."""
    return derived_seed(seed, "tasks", epoch)


def segment_bits(key: int, record_S: np.ndarray, ordinal_S: np.ndarray) -> np.ndarray:
    """The random bits uint64 (S,) of segments, by the numbers of their records and their own inside these."""
    record_bits = mix(np.uint64(key) + np.uint64(GOLDEN) * (record_S.astype(np.uint64) + np.uint64(1)))
    return mix(record_bits + np.uint64(GOLDEN) * (ordinal_S.astype(np.uint64) + np.uint64(1)))


def num_hidden(bits_S: np.ndarray, length_S: np.ndarray) -> np.ndarray:
    """How many tokens of a segment are targets: 1 to length - 1, all as likely; int64 (S,), 0 below length 2."""
    choices_S = np.maximum(length_S - 1, 1).astype(np.uint64)
    return np.where(length_S > 1, 1 + (bits_S % choices_S).astype(np.int64), 0)


def hidden_subsets(bits_S: np.ndarray, length_S: np.ndarray, count_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count_S[s]` of the positions 1 to length_S[s] - 1 of every segment, each subset equally likely.

    Every position gets a random key; the smallest keys of a segment are chosen. Segment, key and position form one
    integer, so that one plain sort does it for all segments, and equal keys do not depend on other segments.

    Returns:
        Segment number and position of all that were chosen, int64 (count_S.sum(),).
    """
    chosen = [
        _subsets(bits_S[begin:stop], length_S[begin:stop], count_S[begin:stop], begin)
        for begin, stop in ((begin, begin + _AT_ONCE) for begin in range(0, len(bits_S), _AT_ONCE))
    ]
    segments, positions = np.concatenate([*chosen, np.zeros((2, 0), np.int64)], axis=1)
    return segments, positions


def _subsets(
    bits_S: np.ndarray, length_S: np.ndarray, count_S: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    candidates_S = np.maximum(length_S - 1, 0)
    begin_S = np.cumsum(candidates_S) - candidates_S
    position = (1 + ordinals(candidates_S)).astype(np.uint64)
    keys = mix(np.repeat(bits_S, candidates_S) + np.uint64(GOLDEN) * position) >> np.uint64(64 - _KEY_BITS)
    segment = np.repeat(np.arange(len(bits_S), dtype=np.uint64), candidates_S)
    packed = (segment << np.uint64(_KEY_BITS + _POSITION_BITS)) | (keys << np.uint64(_POSITION_BITS)) | position
    packed.sort()
    packed = packed[np.repeat(begin_S, count_S) + ordinals(count_S)]
    return (
        (packed >> np.uint64(_KEY_BITS + _POSITION_BITS)).astype(np.int64) + first,
        (packed & np.uint64(MAX_SEGMENT - 1)).astype(np.int64),
    )


@dataclass(frozen=True)
class Segments:
    """The segments of some records, in order; every array is (S,)."""

    owner_S: np.ndarray  # position of the segment's record among the given ones
    record_S: np.ndarray  # number of the segment's record in the data
    ordinal_S: np.ndarray  # number of the segment in its record
    length_S: np.ndarray
    type_S: np.ndarray
    task_S: np.ndarray

    @property
    def begins_S(self) -> np.ndarray:
        """True where a sample begins, with a prompt of its own: a record, or an option of a question."""
        return (self.ordinal_S == 0) | (self.task_S >= WRONG_CHOICE)


def segments_of(data: LiveDataset, record_N: np.ndarray) -> Segments:
    """Looks up the segments of some records."""
    count_N = data.column["segments"][record_N].astype(np.int64)
    owner_S = np.repeat(np.arange(len(record_N)), count_N)
    ordinal_S = ordinals(count_N)
    where_S = data.segment_begin[record_N][owner_S] + ordinal_S
    return Segments(
        owner_S=owner_S,
        record_S=record_N[owner_S],
        ordinal_S=ordinal_S,
        length_S=data.column["segment_length"][where_S].astype(np.int64),
        type_S=data.column["segment_type"][where_S].astype(np.int64),
        task_S=data.column["segment_task"][where_S].astype(np.int64),
    )


def _told_whole(segments: Segments) -> np.ndarray:
    """bool (S,), True in records of which all but the first token are targets."""
    told_S = np.zeros(len(segments.owner_S), bool)
    if segments.task_S.max(initial=0) >= GENERATE:
        for task, type in TOLD_WITH_TYPE.items():
            told_S |= (segments.task_S == task) & (segments.type_S == type)
        told_S = np.isin(segments.owner_S, segments.owner_S[told_S])
    return told_S


def targets_by_segment(segments: Segments, key: int) -> np.ndarray:
    """int64 (S,), number of targets per segment in the epoch of `key`; a question counts once, at its right option."""
    bits_S = segment_bits(key, segments.record_S, segments.ordinal_S)
    drawn_S = (segments.task_S == MASKED_LM) | (segments.task_S == LM)
    count_S = np.where(drawn_S, num_hidden(bits_S, segments.length_S), 0)
    count_S = np.where(_told_whole(segments), np.maximum(segments.length_S - 1, 0), count_S)
    count_S = np.where(segments.task_S == TOLD, segments.length_S, count_S)
    return np.where(segments.task_S == RIGHT_CHOICE, 1, count_S)


def _hidden(segments: Segments, within_T: np.ndarray, begin_S: np.ndarray, key: int) -> np.ndarray:
    """bool (T,), True for the tokens that are not context."""
    length_S = segments.length_S
    bits_S = segment_bits(key, segments.record_S, segments.ordinal_S)
    count_S = num_hidden(bits_S, length_S)
    told_S = _told_whole(segments)
    # The first hidden token of a segment whose end is hidden; none where that is the segment's length.
    first_S = np.where(segments.task_S == LM, length_S - count_S, length_S)
    first_S = np.where(told_S, segments.ordinal_S == 0, first_S)
    first_S = np.where(segments.task_S == TOLD, 0, first_S)
    hidden_T = within_T >= np.repeat(first_S, length_S)
    masked = np.flatnonzero((segments.task_S == MASKED_LM) & ~told_S)
    chosen, position = hidden_subsets(bits_S[masked], length_S[masked], count_S[masked])
    hidden_T[begin_S[masked][chosen] + position] = True
    return hidden_T


def build_batch(
    data: LiveDataset,
    record_N: np.ndarray,
    row_N: np.ndarray,
    *,
    num_rows: int,
    max_length: int,
    prompt_length: int,
    key: int,
) -> dict[str, np.ndarray]:
    """Builds the rows that hold some records, in the order in which they are given.

    Args:
        data: The records.
        record_N: Their numbers, row by row.
        row_N: The row of each, rising; the records of a row fit into it.
        num_rows: B.
        max_length: L.
        prompt_length: P.
        key: The epoch's key of random draws.

    Returns:
        `input, position, segment, span, task, targets, choices` int64 (B, L), `context` bool (B, L), `length` int64
        (B,). `task` is the segment's, 0 in prompts and -1 in padding. `choices` at the last token of an option is
        twice the question's number in its row, and one more if the option is right; -1 elsewhere.
    """
    segments = segments_of(data, record_N)
    length_S, begins_S = segments.length_S, segments.begins_S
    tokens_T = np.concatenate(data.tokens(record_N)) if len(record_N) else np.zeros(0, np.int64)

    # Where every segment goes: `at` counts positions over the rows laid end to end.
    whole_S = length_S + prompt_length * begins_S
    row_S = row_N[segments.owner_S]
    used_B = np.bincount(row_S, whole_S, num_rows).astype(np.int64)
    before_S = np.cumsum(whole_S) - whole_S
    at_S = before_S + (np.arange(num_rows) * max_length - (np.cumsum(used_B) - used_B))[row_S]
    sample_at_S = np.maximum.accumulate(np.where(begins_S, at_S, 0))
    sample_S = np.cumsum(begins_S) - 1
    first_S = np.concatenate([np.ones(1, bool), row_S[1:] != row_S[:-1]]) if len(row_S) else np.zeros(0, bool)
    span_S = sample_S - np.maximum.accumulate(np.where(first_S, sample_S, 0))
    begin_S = np.cumsum(length_S) - length_S
    within_T = ordinals(length_S)
    at_T = np.repeat(at_S + prompt_length * begins_S, length_S) + within_T
    prompt_at = at_S[begins_S][:, None] + np.arange(prompt_length)

    def blank(value: int, dtype: type = np.int64) -> np.ndarray:
        return np.full(num_rows * max_length, value, dtype)

    def by_segment(array: np.ndarray, value_S: np.ndarray) -> None:
        array[at_T] = np.repeat(value_S, length_S)

    hidden_T = _hidden(segments, within_T, begin_S, key)
    ids, position, segment, context = blank(0), blank(0), blank(0), blank(0, np.bool_)
    span, task, targets, choices = blank(PADDING_SPAN), blank(-1), blank(NO_TARGET), blank(NO_CHOICE)
    prompt_task = data.column["task"][segments.record_S[begins_S]].astype(np.int64)[:, None]
    ids[prompt_at] = np.arange(prompt_length) + prompt_length * prompt_task
    ids[at_T] = tokens_T
    position[prompt_at] = np.arange(prompt_length)
    position[at_T] = at_T - np.repeat(sample_at_S, length_S)
    by_segment(segment, segments.type_S)
    context[prompt_at] = True
    context[at_T] = ~hidden_T
    span[prompt_at] = span_S[begins_S][:, None]
    by_segment(span, span_S)
    task[prompt_at] = 0
    by_segment(task, segments.task_S)
    # A segment's first token is no target of the segment before, unless its task is TOLD.
    told_T = hidden_T & ((within_T > 0) | np.repeat(segments.task_S == TOLD, length_S))
    targets[at_T[told_T] - 1] = tokens_T[told_T]
    option_S = segments.task_S >= WRONG_CHOICE
    opens_S = option_S & (segments.ordinal_S == 0)
    asked_S = np.cumsum(opens_S)
    question_S = asked_S - 1 - np.maximum.accumulate(np.where(first_S, asked_S - opens_S, 0))
    choices[(at_S + whole_S - 1)[option_S]] = (2 * question_S + (segments.task_S == RIGHT_CHOICE))[option_S]

    rows = {"input": ids, "position": position, "segment": segment, "span": span, "task": task, "context": context}
    rows |= {"targets": targets, "choices": choices}
    return {name: array.reshape(num_rows, max_length) for name, array in rows.items()} | {"length": used_B}
