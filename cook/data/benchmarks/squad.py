"""SQuAD 1.1 and 2.0 as distributed, and their windows: pieces of a document that fit into a row with the question.

Source: Rajpurkar et al. (2016, 2018) for the files; Devlin et al. (2019), run_squad.py, for windows by stride and the
rule that a token is scored in the window that gives it the most context.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cook.base.errors import UserError
from cook.base.files import read_json
from cook.data.benchmarks.token_rows import TokenRows
from cook.data.corpus import whole_text
from cook.data.reports import LeftOut

MAX_BYTES = 256 << 20
"""A larger file is refused: parsed, it takes many times its size in memory."""

LOST = "questions whose answer is neither at its answer_start nor at exactly one other place in the context"
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
    impossible: bool = False  # the file says that it cannot be answered


class SquadFile(NamedTuple):
    """The content of a file."""

    questions: tuple[Question, ...]
    left_out: LeftOut
    num_found: int  # answers that were found by their words, because they are not at their `answer_start`


class Window(NamedTuple):
    """A piece of a question's document, in a row."""

    question: int  # its number
    first: int  # the row's first token of the document
    offsets: np.ndarray  # (tokens of the piece, 2) characters of the context at which each token begins and ends
    has_most_context: np.ndarray  # bool (tokens of the piece,): no other window gives the token more context


def read_squad(path: Path, *, for_training: bool) -> SquadFile:
    """Reads a file of either version.

    For training, only questions that cannot be answered or whose first answer is in the context are kept. An answer
    that is not at its `answer_start` is looked for by its words. An evaluation needs no places: all questions and
    answers are kept as they are.

    Raises:
        UserError: no such file, not JSON (with line and column), not SQuAD's layout (with the place in it), or, for
            training, most of the answers cannot be found.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: too large for a SQuAD file", wanted=f"at most {MAX_BYTES >> 20} MB")
    content = read_json(path)
    questions = []
    for a, article in enumerate(_list(content, "data", f"{path}")):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"{path}: data[{a}]")):
            place = f"{path}: data[{a}].paragraphs[{p}]"
            context = _text(paragraph, "context", place)
            for q, entry in enumerate(_list(paragraph, "qas", place)):
                questions.append(_question(entry, context, f"{place}.qas[{q}]"))
    if not questions:
        raise UserError(f"{path}: contains no questions")
    ids = {question.id for question in questions}
    if len(ids) != len(questions):
        raise UserError(f"{path}: two questions have the same id", wanted="unique ids")
    return _placed(questions, path) if for_training else SquadFile(tuple(questions), LeftOut(), 0)


def _question(entry: Any, context: str, place: str) -> Question:
    impossible = entry.get("is_impossible", False) if isinstance(entry, dict) else False
    answers = []
    # A question that has no answer may list plausible ones elsewhere; "answers" is empty then.
    for n, answer in enumerate([] if impossible else _list(entry, "answers", place)):
        text, start = _text(answer, "text", f"{place}.answers[{n}]"), answer.get("answer_start")
        if type(start) is not int:
            raise UserError(
                f"{place}.answers[{n}]: answer_start is not a number", wanted="an integer", got=repr(start)[:80]
            )
        answers.append((text, start))
    return Question(
        id=_text(entry, "id", place),
        text=_text(entry, "question", place),
        context=context,
        answers=tuple(answers),
        impossible=bool(impossible),
    )


def _placed(questions: Sequence[Question], path: Path) -> SquadFile:
    """The questions whose answers can be taught."""
    kept, left_out, num_found = [], LeftOut(), 0
    for question in questions:
        if question.impossible:
            kept.append(question)
        elif not question.answers:
            left_out.add("questions with neither an answer nor is_impossible", 1, question.id)
        elif (found := _found(*question.answers[0], question.context)) is None:
            left_out.add(LOST, 1, question.id)
        else:
            num_found += found[1] != question.answers[0][1]
            kept.append(replace(question, answers=(found, *question.answers[1:])))
    if 2 * (lost := left_out.count(LOST)) > len(questions):
        raise UserError(
            f"{path}: most answers do not stand in the context at their answer_start",
            wanted="the number of characters before the answer",
            got=f"{lost} of {len(questions)} questions cannot be used",
            remedy="count answer_start in characters of the context as the file holds it, from 0",
        )
    return SquadFile(tuple(kept), left_out, num_found)


def _found(text: str, start: int, context: str) -> tuple[str, int] | None:
    """An answer as it is in the context, up to white space: at `start`, or else where it occurs once."""
    if not text.strip():
        return None
    words = re.compile(r"\s+".join(map(re.escape, text.split())))
    at = start + len(text) - len(text.lstrip())
    if start >= 0 and (match := words.match(context, at)):
        return match[0], at
    elsewhere = list(islice(words.finditer(context), 2))
    return (elsewhere[0][0], elsewhere[0].start()) if len(elsewhere) == 1 else None


def _list(value: Any, key: str, place: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise UserError(f"{place}: no list {key!r}", wanted="a file of SQuAD 1.1 or 2.0")
    return found


def _text(value: Any, key: str, place: str) -> str:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, str):
        raise UserError(f"{place}: no text {key!r}", wanted="a file of SQuAD 1.1 or 2.0")
    return whole_text(found, f"{place}: {key!r}")


def squad_windows(
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    max_length: int,
    doc_stride: int,
    max_query_length: int,
    left_out: LeftOut | None = None,
) -> tuple[TokenRows, list[Window]]:
    """Cuts every question's document into windows that begin `doc_stride` tokens apart.

    Args:
        questions: Of a file.
        tokenizer: A fast tokenizer of Hugging Face's with `[CLS]`, `[SEP]` and `[PAD]`.
        max_length: Tokens of a row: `[CLS]` question `[SEP]` piece `[SEP]`.
        doc_stride: Tokens from the start of one piece to that of the next.
        max_query_length: Tokens of a question at most; the rest is cut off.
        left_out: Given for training: counts what is cut off, and the questions whose answer no window holds whole.
            They are left out, because training would treat them as having no answer.

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
            raise UserError(
                "max_length is too small for any token of the document", wanted=f"more than {len(head) + 1} tokens"
            )
        begins = _begins(len(ids), room, min(doc_stride, room))
        most = _most_context(begins, len(ids), room)
        span = _token_span(question, offsets)
        if left_out is not None:
            left_out.add("tokens at the ends of long questions", max(0, len(asked[number][0]) - max_query_length))
            whole = any(span and begin <= span[0] and span[1] < begin + room for begin in begins)
            if question.answers and not whole:
                left_out.add("questions whose answer no window holds whole", 1, question.id)
                continue
        for order, begin in enumerate(begins):
            piece = ids[begin : begin + room]
            rows.append([*head, *piece, sep_id])
            segments.append([0] * len(head) + [1] * (len(piece) + 1))
            inside = span is not None and begin <= span[0] and span[1] < begin + len(piece)
            shift = len(head) - begin
            targets.append((span[0] + shift, span[1] + shift) if span and inside else NO_ANSWER)
            flags = most[begin : begin + len(piece)] == order
            windows.append(Window(number, len(head), offsets[begin : begin + len(piece)], flags))
    if not rows:
        raise UserError("no question is left to train on", got=f"left out: {left_out}")
    return TokenRows(rows, segments, np.array(targets, np.int64), pad_id=tokenizer.pad_token_id), windows


def _tokenised(texts: Sequence[str], tokenizer: Any) -> list[tuple[list[int], np.ndarray]]:
    if not texts:
        return []  # the library refuses an empty list
    unique = list(dict.fromkeys(texts))  # a paragraph has several questions
    # Not verbose: texts longer than the model reads are no mistake, windows are cut from them.
    made = tokenizer(unique, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(made["input_ids"], made["offset_mapping"], strict=True)
    arrays = [(list(ids), np.array(offsets, np.int64).reshape(-1, 2)) for ids, offsets in pairs]
    by_text = dict(zip(unique, arrays, strict=True))
    return [by_text[text] for text in texts]


def _begins(length: int, room: int, stride: int) -> list[int]:
    begins = [0]
    while begins[-1] + room < length:
        begins.append(begins[-1] + stride)
    return begins


def _most_context(begins: Sequence[int], length: int, room: int) -> np.ndarray:
    """Per token of the document the number of the window in which the smaller of its two contexts is largest."""
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
    """First and last token of the first answer; None if there is no answer or it is not there in the context."""
    text, start = question.answers[0] if question.answers else ("", 0)
    end = start + len(text)
    if not text or start < 0 or question.context[start:end] != text:
        return None
    touched = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None
