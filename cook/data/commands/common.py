"""What the commands share: outputs, records to read and write, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cook.base.errors import UserError
from cook.data.cpm_live.meta import FileInfo, LiveMeta, write_meta
from cook.data.cpm_live.records import BadRecord, read_record
from cook.data.cpm_live.scan import read_numbers
from cook.data.cpm_live.writer import LiveWriter
from cook.data.reports import Progress

FILE_BYTES = 1 << 30
"""At about this size a data file ends and the next one begins."""


def new_folder(folder: Path) -> Path:
    """A folder to write into, made if missing; a `UserError` if it holds something or cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = next(folder.iterdir(), None)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be used: {error.strerror}", wanted="a new folder") from None
    if taken is not None:
        raise UserError(f"--output: {folder} is not empty", wanted="a new folder", got=taken.name)
    return folder


def check_new_file(path: Path) -> None:
    if path.exists():
        raise UserError(f"--output: {path} already exists", wanted="a new file")


def tokenizer_type(path: str, type: str | None) -> str:
    """The given type, or else the one that the path shows."""
    return type or ("hf" if Path(path).is_dir() else "jieba" if Path(path).suffix == ".txt" else "sentencepiece")


def size(option: str, text: str) -> int:
    """Bytes in the value `text` of an option, a number of at least 16 that may end in K, M or G (of 1024)."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    value = int(digits) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(unit, 0) if digits.isdecimal() else 0
    if value < 16:
        wanted = "at least 16 bytes, such as 4096, 512K, 16M or 1G"
        raise UserError(f"{option} is not a size", wanted=wanted, got=repr(text))
    return value


def all_numbers(meta: LiveMeta, progress: Progress | None = None) -> Iterator[np.ndarray]:
    """The records of a folder in order, as numbers, each checked. UserError: the data is damaged."""
    for file in meta.shown:
        assert file.block_size is not None
        path = meta.folder / file.file_name
        for number, values in enumerate(read_numbers(path, meta.version, file.block_size, file.num_blocks)):
            try:
                read_record(values)
            except BadRecord as bad:
                raise UserError(
                    f"{path}, record {number}: {bad}",
                    remedy="`cook data inspect` reports the block and offset",
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
    remaining = iter(records)
    infos: list[FileInfo] = []
    first = next(remaining, None)
    while first is not None:
        with LiveWriter(folder / f"{name}-{len(infos):05d}", version=version, block_size=block_size) as writer:
            writer.write(first)
            while (first := next(remaining, None)) is not None:
                if writer.nbytes >= FILE_BYTES:
                    break
                writer.write(first)
        infos.append(writer.info())
    if not infos:
        raise UserError("there are no records to write", wanted="at least one")
    write_meta(folder, version, infos)
    return infos
