"""From the lines of input files to records: documents, their tokens, pieces.

A document's tokens (unknown ones left out) are cut into pieces of max_length - prompt_length - 2; a rest shorter than
32 is dropped. A piece becomes `<s> piece </s>`, for masked language modelling or for plain language modelling.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cook.base.errors import UserError
from cook.base.seeds import derived_seed
from cook.data.corpus import BOM, JSONL_SUFFIXES, MIN_REST, PART_BYTES, grouped, object_of, text_of
from cook.data.cpm_live.records import (
    LM,
    LM_PROMPT,
    MASKED_LM,
    MASKED_LM_PROMPT,
    MASKED_SEGMENT,
    TEXT_SEGMENT,
    Record,
    Segment,
)
from cook.data.reports import LeftOut, Progress
from cook.data.source_files import has_ending, is_compressed, lines_of, matching_files, opened
from cook.text.tokenizer import Tokenizer

READ_AT_ONCE = 64 << 20
COUNTS = ("documents", "tokens", "records")
SHORT = f"documents shorter than {MIN_REST} tokens"
RESTS = f"tokens in rests and documents shorter than {MIN_REST} tokens"
UNKNOWN = "tokens that the tokenizer does not know"
EMPTY = "documents without a known token"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the records depend on, apart from the text."""

    format: str
    text_field: str
    max_length: int
    prompt_length: int
    masked_share: float
    seed: int
    version: int
    block_size: int

    @property
    def piece(self) -> int:
        """Tokens of a whole piece."""
        return self.max_length - self.prompt_length - 2


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of an input file: the lines that begin in it. A compressed file is a single part."""

    number: int
    path: str
    name: str
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


def format_of(inputs: Iterable[str]) -> str:
    """The format that the inputs' names show."""
    return "jsonl" if all(has_ending(given, JSONL_SUFFIXES) for given in inputs) else "lines"


def input_files(inputs: Iterable[str], format: str, left_out: LeftOut) -> list[tuple[Path, str]]:
    """The files that the inputs name and their names in the corpus, in order, none twice; counts the rest."""
    found: dict[Path, tuple[Path, str]] = {}
    for given in inputs:
        for path, name in matching_files(given, JSONL_SUFFIXES if format == "jsonl" else None, left_out):
            found.setdefault(path.resolve(), (path, name))
    return list(found.values())


def parts_of(files: Iterable[tuple[Path, str]], part_size: int) -> list[Part]:
    """Cuts the files into parts of about `part_size` bytes; a `UserError` if they are empty."""
    stretches = []
    for path, name in files:
        size = path.stat().st_size
        step = size if is_compressed(path) else part_size
        stretches += [(path, name, begin, min(begin + step, size)) for begin in range(0, size, step or 1)]
    if not stretches:
        raise UserError("the input is empty", wanted="at least one file with text")
    return [
        Part(number=number, path=str(path), name=name, begin=begin, end=end)
        for number, (path, name, begin, end) in enumerate(stretches)
    ]


def records_of(
    part: Part, settings: Settings, tokenizer: Tokenizer, counts: dict[str, int], left_out: LeftOut
) -> Iterator[Record]:
    """The records of a part, in order; adds up `counts` and `left_out`."""
    seed = derived_seed(settings.seed, "preprocess", part.name, part.begin)
    draws = np.random.Philox(seed)  # its raw stream is promised to stay
    limit = settings.masked_share * 2.0**64
    for texts in grouped(documents(part, settings.format, settings.text_field), len):
        for ids in tokenizer.encode_batch(texts):
            counts["documents"] += 1
            known = ids[ids != tokenizer.unk_id] if tokenizer.unk_id is not None else ids
            left_out.add(UNKNOWN, len(ids) - len(known))
            left_out.add(EMPTY, not len(known))
            left_out.add(SHORT, 0 < len(known) < MIN_REST)
            for begin in range(0, len(known), settings.piece):
                piece = known[begin : begin + settings.piece]
                if len(piece) < MIN_REST:
                    left_out.add(RESTS, len(piece))
                    break
                counts["tokens"] += len(piece)
                is_masked = int(draws.random_raw()) < limit
                tokens = np.concatenate([[tokenizer.bos_id], piece, [tokenizer.eos_id]])
                if is_masked:
                    yield Record(MASKED_LM_PROMPT, (Segment(len(tokens), MASKED_SEGMENT, MASKED_LM),), tokens)
                else:
                    yield Record(LM_PROMPT, (Segment(len(tokens), TEXT_SEGMENT, LM),), tokens)


def texts_of(
    inputs: Sequence[str], *, format: str | None, text_field: str, left_out: LeftOut, doing: str
) -> Iterator[str]:
    """The documents of files, folders or glob patterns, with a progress bar named `doing`; counts what is left out.

    Raises:
        UserError: there is no text to read, or a document cannot be read.
    """
    form = format or format_of(inputs)
    parts = parts_of(input_files(inputs, form, left_out), READ_AT_ONCE)
    with Progress(doing, sum(part.size for part in parts)) as progress:
        for part in parts:
            yield from documents(part, form, text_field)
            progress.advance(part.size)


def documents(part: Part, format: str, text_field: str) -> Iterator[str]:
    """The documents of a part; a `UserError` if one is not UTF-8, or not a JSON object with a text."""
    if format == "text":
        block: list[bytes] = []
        start = size = 0
        for offset, line in lines(part):
            start = start if block else offset
            block.append(line)
            size += len(line)
            if size >= PART_BYTES:
                yield _text(b"".join(block), part, start)
                block, size = [], 0
        if block:
            yield _text(b"".join(block), part, start)
        return
    for offset, line in lines(part):
        if not line.strip():
            continue
        if format == "jsonl":
            where = f"{part.path}, offset {offset}"
            yield text_of(object_of(line, where), text_field, where, remedy="--text-field")
        else:
            yield _text(line, part, offset).strip().replace("<n>", "\n")


def lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a part, whole, with their offsets."""
    with opened(part.path) as file:
        if part.begin:
            file.seek(part.begin - 1)
            next(lines_of(file, part.path, part.begin - 1), None)  # up to the end of the line that begins before
        begin = file.tell()
        for offset, line in lines_of(file, part.path, begin):
            if offset >= part.end and not is_compressed(part.path):
                break
            yield offset, line


def _text(content: bytes, part: Part, offset: int) -> str:
    try:
        return content.decode() if offset else content.decode().removeprefix(BOM)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{part.path}: not UTF-8 at offset {offset + error.start}", remedy="convert the file to UTF-8"
        ) from None
