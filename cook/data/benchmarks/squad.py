"""SQuAD 1.1 and 2.0 as distributed, and their windows: pieces of a document that a model can read with the question.

Source: Rajpurkar et al. (2016, 2018) for the files; Devlin et al. (2019), run_squad.py, for windows by stride and the
rule that a token is judged in the window that gives it the most context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cook.base.errors import UserError
from cook.base.files import read_json
from cook.data.benchmarks.token_rows import TokenRows

NO_ANSWER = (0, 0)
"""A window without the answer points at its first token, `[CLS]`."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question on one paragraph."""

    id: str
    text: str
    context: str
    answers: tuple[tuple[str, int], ...]
    """Texts and the characters of the context at which they start; none if it cannot be answered."""


class Window(NamedTuple):
    """A piece of a question's document. Offsets and flags speak of the row's tokens."""

    question: int
    """Number of its question."""
    first: int
    """The row's first token of the document."""
    offsets: np.ndarray
    """`[tokens of the piece, 2]` characters of the context at which each token begins and ends."""
    has_most_context: np.ndarray
    """`[tokens of the piece]`: whether no other window gives the token more context."""


def read_squad(path: Path) -> tuple[Question, ...]:
    """Reads a file of either version.

    Raises:
        UserError: no such file, not JSON (with line and column), or not SQuAD's layout (with the place in it).
    """
    content = read_json(path)
    questions = []
    for a, article in enumerate(_list(content, "data", f"{path}")):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"{path}: data[{a}]")):
            place = f"{path}: data[{a}].paragraphs[{p}]"
            context = _text(paragraph, "context", place)
            for q, entry in enumerate(_list(paragraph, "qas", place)):
                questions.append(_question(entry, context, f"{place}.qas[{q}]"))
    if not questions:
        raise UserError(f"{path}: holds no question")
    ids = {question.id for question in questions}
    if len(ids) != len(questions):
        raise UserError(f"{path}: two questions have one id", wanted="every id once")
    return tuple(questions)


def _question(entry: Any, context: str, place: str) -> Question:
    impossible = entry.get("is_impossible", False) if isinstance(entry, dict) else False
    answers = []
    # A question that has no answer may list plausible ones elsewhere; "answers" is empty then.
    for n, answer in enumerate([] if impossible else _list(entry, "answers", place)):
        text, start = _text(answer, "text", f"{place}.answers[{n}]"), answer.get("answer_start")
        if not isinstance(start, int) or not 0 <= start <= len(context):
            raise UserError(
                f"{place}.answers[{n}]: answer_start is not a place in the context",
                wanted=f"0 to {len(context)}",
                got=start,
            )
        answers.append((text, start))
    return Question(
        id=_text(entry, "id", place), text=_text(entry, "question", place), context=context, answers=tuple(answers)
    )


def _list(value: Any, key: str, place: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise UserError(f"{place}: no list {key!r}", wanted="a file of SQuAD 1.1 or 2.0")
    return found


def _text(value: Any, key: str, place: str) -> str:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, str):
        raise UserError(f"{place}: no text {key!r}", wanted="a file of SQuAD 1.1 or 2.0")
    return found


def squad_windows(
    questions: Sequence[Question], tokenizer: Any, *, max_length: int, doc_stride: int, max_query_length: int
) -> tuple[TokenRows, list[Window]]:
    """Cuts every question's document into windows that begin `doc_stride` tokens apart.

    Args:
        questions: What `read_squad` gave.
        tokenizer: A fast tokenizer of Hugging Face's with `[CLS]`, `[SEP]` and `[PAD]`.
        max_length: Tokens of a row: `[CLS]` question `[SEP]` piece `[SEP]`.
        doc_stride: Tokens from the start of one piece to that of the next.
        max_query_length: Tokens of a question at most; the rest is cut off.

    Returns:
        The rows, with the first and last token of the first answer as targets, and what each row shows.
    """
    cls_id, sep_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows, segments, targets, windows = [], [], [], []
    documents = _tokenised([question.context for question in questions], tokenizer)
    asked = _tokenised([question.text for question in questions], tokenizer)
    for number, question in enumerate(questions):
        ids, offsets = documents[number]
        head = [cls_id, *asked[number][0][:max_query_length], sep_id]
        room = max_length - len(head) - 1
        if room < 1:
            raise UserError("max_length leaves no room for the document", wanted=f"more than {len(head) + 1} tokens")
        begins = _begins(len(ids), room, min(doc_stride, room))
        most = _most_context(begins, len(ids), room)
        span = _token_span(question, offsets)
        for order, begin in enumerate(begins):
            piece = ids[begin : begin + room]
            rows.append([*head, *piece, sep_id])
            segments.append([0] * len(head) + [1] * (len(piece) + 1))
            inside = span is not None and begin <= span[0] and span[1] < begin + len(piece)
            shift = len(head) - begin
            targets.append((span[0] + shift, span[1] + shift) if span and inside else NO_ANSWER)
            flags = most[begin : begin + len(piece)] == order
            windows.append(Window(number, len(head), offsets[begin : begin + len(piece)], flags))
    return TokenRows(rows, segments, np.array(targets, np.int64), pad_id=tokenizer.pad_token_id), windows


def _tokenised(texts: Sequence[str], tokenizer: Any) -> list[tuple[list[int], np.ndarray]]:
    unique = list(dict.fromkeys(texts))  # a paragraph has several questions
    # Longer than the model reads is no mistake here: windows are cut from it.
    made = tokenizer(unique, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(made["input_ids"], made["offset_mapping"], strict=True)
    by_text = {
        text: (list(ids), np.array(offsets, np.int64).reshape(-1, 2))
        for text, (ids, offsets) in zip(unique, pairs, strict=True)
    }
    return [by_text[text] for text in texts]


def _begins(length: int, room: int, stride: int) -> list[int]:
    begins = [0]
    while begins[-1] + room < length:
        begins.append(begins[-1] + stride)
    return begins


def _most_context(begins: Sequence[int], length: int, room: int) -> np.ndarray:
    """For every token of the document the number of the window in which the lesser of its two contexts is largest."""
    best, owner = np.full(length, -1.0), np.zeros(length, np.int64)
    for order, begin in enumerate(begins):
        size = min(room, length - begin)
        left = np.arange(size)
        score = np.minimum(left, size - 1 - left) + 0.01 * size
        better = score > best[begin : begin + size]
        best[begin : begin + size][better] = score[better]
        owner[begin : begin + size][better] = order
    return owner


def _token_span(question: Question, offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last token of the first answer; None if there is no answer or the context does not hold it there."""
    for text, start in question.answers[:1]:
        end = start + len(text)
        if not text or question.context[start:end] != text:
            return None
        touched = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        return (int(touched[0]), int(touched[-1])) if len(touched) else None
    return None
