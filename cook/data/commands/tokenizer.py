"""Trains a sentencepiece tokenizer on text or JSON lines, as a run without a tokenizer of its own does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cook.base.errors import UserError
from cook.data.commands.pieces import documents, format_of, input_files, parts_of
from cook.data.left_out import LeftOut
from cook.data.prepare import NOT_SAMPLED
from cook.data.progress import Progress
from cook.text.sentencepiece import train_sentencepiece

_PART = 64 << 20


def train_tokenizer(
    inputs: Sequence[str], target: Path, *, format: str | None, text_field: str, vocab_size: int, seed: int
) -> None:
    """Trains on the documents of `inputs` and writes `target`.

    Raises:
        UserError: the target exists, or there is no text to read.
    """
    if target.exists():
        raise UserError(f"--output: {target} is there already", wanted="a new file")
    format = format or format_of(inputs)
    left_out = LeftOut()
    parts = parts_of(input_files(inputs, format, left_out), _PART)
    with Progress("reading", sum(part.end - part.begin for part in parts), unit="MB", scale=1e6) as progress:

        def texts() -> Iterator[str]:
            for part in parts:
                yield from documents(part, format, text_field)
                progress.advance(part.end - part.begin)

        unseen = train_sentencepiece(texts(), target, vocab_size=vocab_size, seed=seed)
        left_out.add(NOT_SAMPLED, unseen)
    print(f"{target}: {vocab_size} ids")
    for sentence in left_out.sentences("the input"):
        print(sentence)
