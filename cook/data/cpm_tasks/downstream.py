"""Downstream data for CPM-Ant (CPM-Live, branch cpm-ant, examples/tune.py).

`{"input": text, "target": text}`: the input is context, the target is predicted from left to right.
`{"input": text, "options": [text, …], "target": number}`: every option makes a sample, `input option [是否正确]` ("is
this right"), all of it context; its score is the logit of 是 ("yes") at its last token, and the loss is the cross
entropy of the right option among the scores. What does not fit is cut off at the input's beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cook.base.errors import UserError
from cook.data.corpus import text_of, whole_text
from cook.data.cpm_live.records import (
    CONTEXT,
    DOWNSTREAM_PROMPT,
    RIGHT_CHOICE,
    TEXT_SEGMENT,
    TOLD,
    WRONG_CHOICE,
    Record,
    Segment,
)
from cook.data.reports import LeftOut
from cook.text.tokenizer import Tokenizer

QUESTION, YES = "[是否正确]", "是"
CUT = "tokens at the beginnings of inputs that are too long"


def choice_token(tokenizer: Tokenizer) -> int:
    """The id whose logit at an option's end is the option's score."""
    return int(tokenizer.encode(YES)[0])


def record_of(
    value: Mapping[str, Any],
    where: str,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    prompt_length: int,
    left_out: LeftOut,
) -> Record:
    """The record of one object; with its prompts it fits into a row of `max_length`. `left_out` counts what is cut off.

    Raises:
        UserError: It is not a downstream object, or its target leaves no room. The message begins with `where`.
    """
    text = text_of(value, "input", where, remedy=None)
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    if "options" in value:
        return _question(value, where, ids, tokenizer, max_length, prompt_length, left_out)
    target = [*tokenizer.encode(text_of(value, "target", where, remedy=None)), tokenizer.eos_id]
    room = max_length - prompt_length - len(target)
    if room < 1:
        raise UserError(
            f"{where}: the target is too long to leave any tokens for the input",
            wanted=f"at most {max_length - prompt_length - 1} tokens",
            got=len(target),
            remedy="set data.max_length higher, or leave the object out",
        )
    left_out.add(CUT, max(0, len(ids) - room))
    ids = ids[-room:]
    segments = (Segment(len(ids), TEXT_SEGMENT, CONTEXT), Segment(len(target), TEXT_SEGMENT, TOLD))
    return Record(DOWNSTREAM_PROMPT, segments, np.array(ids + target, np.int64))


def _question(
    value: Mapping[str, Any],
    where: str,
    ids: list[int],
    tokenizer: Tokenizer,
    max_length: int,
    prompt_length: int,
    left_out: LeftOut,
) -> Record:
    options, right = value["options"], value.get("target")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) for option in options):
        raise UserError(f"{where}: 'options' is not a list of texts", wanted="at least two strings")
    if type(right) is not int or not 0 <= right < len(options):
        wanted = f"the number of the right option, 0 to {len(options) - 1}"
        raise UserError(f"{where}: 'target' is not the number of an option", wanted=wanted, got=repr(right)[:80])
    room = max_length // len(options) - prompt_length
    if room < 1:
        raise UserError(
            f"{where}: {len(options)} options do not fit into a row",
            wanted=f"rows of more than {len(options) * prompt_length} positions: each option has a prompt",
            got=max_length,
            remedy="set data.max_length higher, or leave the object out",
        )
    ends = tokenizer.encode(QUESTION)
    whole = [ids + tokenizer.encode(whole_text(option, f"{where}: an option")) + ends for option in options]
    left_out.add(CUT, sum(max(0, len(text) - room) for text in whole))
    texts = [text[-room:] for text in whole]
    segments = tuple(
        Segment(len(text), TEXT_SEGMENT, RIGHT_CHOICE if number == right else WRONG_CHOICE)
        for number, text in enumerate(texts)
    )
    return Record(DOWNSTREAM_PROMPT, segments, np.array([id for text in texts for id in text], np.int64))
