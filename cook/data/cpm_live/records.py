"""A record of CPM-Ant's data: its task, its segments, its tokens.

As numbers: `[task, segments, (length, type, task) of every segment, tokens of every segment]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Tasks of a segment.
MASKED_LM = 0  # a random part of the segment is hidden and predicted; the rest is context
LM = 1  # the end of the segment, of random length, is predicted from left to right
CONTEXT = 2  # nothing is predicted
GENERATE, GENERATE_SECOND = 3, 4  # with a segment of type 2 (or 3): the whole record but its first token is predicted
TOLD = 90  # added by cook: the whole segment is predicted, the first token too, from the position before it
# Added by cook: the segment is one option of a question, with a prompt of its own. The record is all of the question's
# options, of which exactly one is right.
WRONG_CHOICE, RIGHT_CHOICE = 100, 101

# Tasks of a record, which choose its prompt.
MASKED_LM_PROMPT, LM_PROMPT, DOWNSTREAM_PROMPT = 1, 2, 1

# Types of a segment: text with holes, text read from left to right.
MASKED_SEGMENT, TEXT_SEGMENT = 1, 2

SEGMENT_TASKS = frozenset({MASKED_LM, LM, CONTEXT, GENERATE, GENERATE_SECOND, TOLD, WRONG_CHOICE, RIGHT_CHOICE})
TOLD_WITH_TYPE = {GENERATE: 2, GENERATE_SECOND: 3}
MAX_SEGMENTS = 1 << 15


class Segment(NamedTuple):
    """A stretch of a record's tokens."""

    length: int
    type: int
    task: int


class BadRecord(ValueError):
    """The numbers are not a record; the message says why."""


@dataclass(frozen=True)
class Record:
    task: int
    segments: tuple[Segment, ...]
    tokens: np.ndarray  # int64 (num_tokens,), all segments one after the other

    def numbers(self) -> np.ndarray:
        """int64 (2 + 3 segments + num_tokens,), as it is written."""
        head = [self.task, len(self.segments), *(value for segment in self.segments for value in segment)]
        return np.concatenate([np.asarray(head, np.int64), np.asarray(self.tokens, np.int64)])


def read_record(numbers: np.ndarray) -> Record:
    """The record of these numbers, or a `BadRecord`."""
    task, segments = read_header(numbers)
    tokens = numbers[2 + 3 * len(segments) :]
    if len(tokens) and int(tokens.min()) < 0:
        raise BadRecord(f"the token {int(tokens.min())} is negative")
    return Record(task, segments, tokens)


def read_header(numbers: np.ndarray) -> tuple[int, tuple[Segment, ...]]:
    """Task and segments of a record, its tokens unread; a `BadRecord` if they contradict each other."""
    if len(numbers) < 5:
        raise BadRecord(f"{len(numbers)} numbers are not a record, which has at least 5")
    task, count = int(numbers[0]), int(numbers[1])
    if not 0 <= task < 1 << 31:
        raise BadRecord(f"{task} is not a task")
    if not 1 <= count <= MAX_SEGMENTS or 2 + 3 * count > len(numbers):
        raise BadRecord(f"{count} segments do not go into {len(numbers)} numbers")
    segments = tuple(Segment(*triple) for triple in numbers[2 : 2 + 3 * count].reshape(count, 3).tolist())
    for segment in segments:
        if segment.length < 0 or not 0 <= segment.type < 1 << 15:
            raise BadRecord(f"a segment of length {segment.length} and type {segment.type} is impossible")
        if segment.task not in SEGMENT_TASKS:
            raise BadRecord(f"a segment's task is {segment.task}, not one of {sorted(SEGMENT_TASKS)}")
    total = sum(segment.length for segment in segments)
    if total != len(numbers) - 2 - 3 * count:
        raise BadRecord(f"its segments have {total} tokens, the record {len(numbers) - 2 - 3 * count}")
    _check_choices(segments)
    return task, segments


def _check_choices(segments: tuple[Segment, ...]) -> None:
    choices = [segment.task for segment in segments if segment.task >= WRONG_CHOICE]
    if choices and (len(choices) != len(segments) or choices.count(RIGHT_CHOICE) != 1 or len(choices) < 2):
        raise BadRecord("the options of a question come alone, at least two of them, and exactly one is right")
    if choices and not all(segment.length for segment in segments):
        raise BadRecord("an option of a question is empty")
