"""SQuAD answers from a model's start and end logits: n-best lists over a question's windows, null threshold.

Source: Devlin et al. (2019), run_squad.py, write_predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cook.data.benchmarks.squad import Question, Window


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How answers are chosen."""

    n_best: int = 20
    """Number of start, end and answer candidates to keep."""
    max_answer_length: int = 30
    """Largest number of tokens of an answer."""
    allows_no_answer: bool
    """True for SQuAD 2.0."""
    null_threshold: float = 0.0
    """The answer is empty if the null score exceeds the best answer's score by more than this."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The contents of the original's predictions.json, nbest_predictions.json and null_odds.json."""

    predictions: dict[str, str]
    """The answer to each question; empty if there is none."""
    best_texts: dict[str, str]
    """The best answer to each question, ignoring the null threshold."""
    n_best: dict[str, list[dict[str, str | float]]]
    null_odds: dict[str, float]


class _Candidate(NamedTuple):
    text: str
    start: float
    end: float


def choose_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    options: AnswerOptions,
) -> Answers:
    """Chooses the answers to all questions.

    `windows` are those of all questions, in any order. `start_logits` and `end_logits` are `[tokens of its row]` for
    each window, with or without padding.
    """
    by_question: list[list[int]] = [[] for _ in questions]
    for number, window in enumerate(windows):
        by_question[window.question].append(number)
    answers = Answers(predictions={}, best_texts={}, n_best={}, null_odds={})
    for question, numbers in zip(questions, by_question, strict=True):
        candidates = []
        null = _Candidate("", np.inf, 0.0)
        for number in numbers:
            start, end = start_logits[number], end_logits[number]
            if start[0] + end[0] < null.start + null.end:
                null = _Candidate("", float(start[0]), float(end[0]))
            candidates += _candidates(question, windows[number], start, end, options)
        _choose(question.id, candidates, null, options, answers)
    return answers


def _candidates(
    question: Question, window: Window, start: np.ndarray, end: np.ndarray, options: AnswerOptions
) -> list[_Candidate]:
    """The best spans of a window: both ends in the document, and the start in the window with its most context."""
    count = len(window.offsets)
    inside = slice(window.first, window.first + count)
    start, end = start[inside], end[inside]
    starts = [s for s in _largest(start, options.n_best) if window.has_most_context[s]]
    found = []
    for s in starts:
        for e in _largest(end, options.n_best):
            if s <= e < s + options.max_answer_length:
                text = question.context[window.offsets[s, 0] : window.offsets[e, 1]]
                found.append(_Candidate(text, float(start[s]), float(end[e])))
    return found


def _largest(values: np.ndarray, count: int) -> list[int]:
    return np.argsort(-values, kind="stable")[:count].tolist()


def _choose(key: str, candidates: list[_Candidate], null: _Candidate, options: AnswerOptions, answers: Answers) -> None:
    candidates = sorted(candidates, key=lambda c: -(c.start + c.end))
    best: dict[str, _Candidate] = {}
    for candidate in candidates:
        if len(best) < options.n_best:
            best.setdefault(candidate.text, candidate)
    listed = list(best.values()) or [_Candidate("", 0.0, 0.0)]
    first = listed[0]
    if options.allows_no_answer:
        answers.null_odds[key] = null.start + null.end - (first.start + first.end)
        listed = sorted([*(c for c in listed if c.text), null], key=lambda c: -(c.start + c.end))
    no_answer = options.allows_no_answer and answers.null_odds[key] > options.null_threshold
    answers.predictions[key] = "" if no_answer else first.text
    answers.best_texts[key] = first.text
    scores = np.array([c.start + c.end for c in listed])
    likely = np.exp(scores - scores.max())
    likely /= likely.sum()
    answers.n_best[key] = [
        {"text": c.text, "probability": float(p), "start_logit": c.start, "end_logit": c.end}
        for c, p in zip(listed, likely, strict=True)
    ]
