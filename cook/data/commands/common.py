"""What the commands share: folders to write into, records to write, the tokenizer's arguments."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cook.base.errors import UserError
from cook.data.cpm_live.meta import DEFAULT_BLOCK_SIZE, VERSIONS, FileInfo, LiveMeta, write_meta
from cook.data.cpm_live.records import BadRecord, read_record
from cook.data.cpm_live.scan import read_numbers
from cook.data.cpm_live.writer import LiveWriter
from cook.data.progress import Progress
from cook.text.open_tokenizer import TOKENIZERS, load_tokenizer
from cook.text.tokenizer import Tokenizer

FILE_BYTES = 1 << 30
"""A written data file ends at about this size, and the next one begins."""


def new_folder(path: str) -> Path:
    """A folder to write into, made if missing.

    Raises:
        UserError: It holds something, or cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = next(folder.iterdir(), None)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be used: {error.strerror}", wanted="a new folder") from None
    if taken is not None:
        raise UserError(f"--output: {folder} is not empty", wanted="a new folder", got=taken.name)
    return folder


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Adds the inputs, `--format` and `--text-field`."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or quoted glob patterns")
    parser.add_argument(
        "--format",
        choices=("lines", "text", "jsonl"),
        help="lines: one document per line, in which <n> is a line end (as in CPM-Live); text: one document per file; "
        "jsonl: one object per line (default: jsonl for .jsonl, .json and .ndjson files, lines for others)",
    )
    parser.add_argument("--text-field", default="text", help="key of the text in an object (default: %(default)s)")


def add_format(parser: argparse.ArgumentParser) -> None:
    """Adds `--version` and `--block-size`."""
    parser.add_argument(
        "--version", type=int, choices=VERSIONS, default=1, help="of the binary format (default: %(default)s)"
    )
    parser.add_argument(
        "--block-size", type=size, default=DEFAULT_BLOCK_SIZE, metavar="BYTES", help="of a block (default: 16M)"
    )


def add_tokenizer(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds `--tokenizer` and `--tokenizer-type`."""
    parser.add_argument("--tokenizer", required=required, metavar="PATH", help="the tokenizer's file or folder")
    parser.add_argument(
        "--tokenizer-type",
        choices=sorted(TOKENIZERS),
        help="default: hf for a folder, sentencepiece for a .model file, jieba for a .txt file",
    )


def open_tokenizer(arguments: argparse.Namespace) -> Tokenizer:
    """The tokenizer that the arguments name."""
    return load_tokenizer(tokenizer_type(arguments), arguments.tokenizer)


def tokenizer_type(arguments: argparse.Namespace) -> str:
    """Returns the given tokenizer type, or the one that follows from the path."""
    path = Path(arguments.tokenizer)
    told = "hf" if path.is_dir() else "jieba" if path.suffix == ".txt" else "sentencepiece"
    return arguments.tokenizer_type or told


def size(text: str) -> int:
    """Bytes, as a number that may end in K, M or G (of 1024)."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not digits.isdecimal() or unit not in ("", "K", "M", "G"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4096, 512K, 16M or 1G")
    value = int(digits) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[unit]
    if value < 16:
        raise argparse.ArgumentTypeError(f"{text} is too small")
    return value


def at_least(least: int):
    """An argument's type: an integer not below `least`."""

    def convert(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    convert.__name__ = "integer"
    return convert


def all_numbers(meta: LiveMeta, progress: Progress | None = None) -> Iterator[np.ndarray]:
    """The records of a folder in order, as numbers, each checked.

    Raises:
        UserError: The data is damaged.
    """
    for file in meta.shown:
        assert file.block_size is not None
        path = meta.folder / file.file_name
        for number, values in enumerate(read_numbers(path, meta.version, file.block_size, file.num_blocks)):
            try:
                read_record(values)
            except BadRecord as bad:
                raise UserError(
                    f"{path}, record {number}: {bad}",
                    remedy="`python -m cook.data inspect` reports the block and offset",
                ) from None
            if progress is not None:
                progress.advance(values.nbytes)
            yield values


def write_folder(
    folder: Path, records: Iterable[np.ndarray], *, version: int, block_size: int, name: str = "data"
) -> list[FileInfo]:
    """Writes records as a folder of binary data: one file, or several where they are many.

    Raises:
        UserError: There are no records, or one does not fit into a block.
    """
    remaining, begin = iter(records), 0
    infos: list[FileInfo] = []
    first = next(remaining, None)
    while first is not None:
        with LiveWriter(folder / f"{name}-{len(infos):05d}", version=version, block_size=block_size) as writer:
            writer.write(first)
            while (first := next(remaining, None)) is not None:
                if writer.nbytes >= FILE_BYTES:
                    break
                writer.write(first)
        infos.append(writer.info(begin))
        begin += writer.num_blocks
    if not infos:
        raise UserError("there are no records to write", wanted="at least one")
    write_meta(folder, version, infos)
    return infos
