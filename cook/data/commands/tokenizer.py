"""Trains a sentencepiece tokenizer on text or JSON lines, as a run without a tokenizer of its own does."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from cook.base.errors import UserError
from cook.data.commands import common
from cook.data.commands.pieces import documents, format_of, input_files, parts_of
from cook.data.left_out import LeftOut
from cook.data.prepare import NOT_SAMPLED
from cook.data.progress import Progress
from cook.text.sentencepiece import train_sentencepiece

_PART = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    common.add_inputs(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="a new .model file")
    parser.add_argument("--vocab-size", required=True, type=common.at_least(1), help="number of ids")
    parser.add_argument("--seed", type=int, default=0, help="chooses lines of a large corpus (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    target = Path(arguments.output)
    if target.exists():
        raise UserError(f"--output: {target} is there already", wanted="a new file")
    format = arguments.format or format_of(arguments.inputs)
    left_out = LeftOut()
    parts = parts_of(input_files(arguments.inputs, format, left_out), _PART)
    with Progress("reading", sum(part.end - part.begin for part in parts), unit="MB", scale=1e6) as progress:

        def texts() -> Iterator[str]:
            for part in parts:
                yield from documents(part, format, arguments.text_field)
                progress.advance(part.end - part.begin)

        unseen = train_sentencepiece(texts(), target, vocab_size=arguments.vocab_size, seed=arguments.seed)
        left_out.add(NOT_SAMPLED, unseen)
    print(f"{target}: {arguments.vocab_size} ids")
    for sentence in left_out.sentences("the input"):
        print(sentence)
