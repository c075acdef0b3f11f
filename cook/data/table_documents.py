"""Documents in tables: parquet files, and what Hugging Face's `datasets` reads: arrow folders, datasets of the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from cook.base.errors import UserError
from cook.base.files import sha256
from cook.data.source_files import Item, SourceFile

UNREADABLE = (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException)
"""What the libraries raise for a table that they cannot read."""

BUFFER_BYTES = 1 << 20
ROWS_AT_ONCE = 16
MAX_UNPACKED = 256 << 20
MAX_RATIO = 100


def read_parquet(file: SourceFile) -> Iterator[Item]:
    """Rows of a parquet file, read page by page.

    Raises:
        UserError: The file is not a whole parquet file (the row is named), or unpacks to many times its size.
    """
    row = 0
    try:
        with parquet.ParquetFile(file.path, pre_buffer=False, buffer_size=BUFFER_BYTES) as table:
            _check_sizes(table.metadata, file.path)
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE):
                for values in batch.to_pylist():
                    yield Item(f"{file.name}:{row}", f"{file.path}, row {row}", values)
                    row += 1
    except UNREADABLE as error:
        raise UserError(f"{file.path}: cannot be read as parquet at row {row}: {_first_line(error)}") from error


def _check_sizes(metadata: Any, path: Path) -> None:
    """Refuses columns that unpack to many times their size: memory holds whole pages."""
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            unpacked, packed = column.total_uncompressed_size, column.total_compressed_size
            if unpacked > MAX_UNPACKED and unpacked > MAX_RATIO * packed:
                raise UserError(
                    f"{path}: row group {group} of the column {column.path_in_schema!r} unpacks to many times its size",
                    wanted=f"at most {MAX_RATIO} times, or at most {MAX_UNPACKED >> 20} MB",
                    got=f"{unpacked:,} bytes from {packed:,}",
                    remedy="write the table again in smaller row groups",
                )


def list_arrow_folders(paths: Sequence[str], split: str, digest: Callable[[Path], str]) -> tuple[SourceFile, ...]:
    """Folders that `save_to_disk` wrote, each as one file of the corpus; a `UserError` if one is not usable."""
    found = []
    for given in paths:
        folder = _arrow_folder(Path(given), split)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        content = "".join(f"{path.name} {digest(path)}\n" for path in files)
        whole = hashlib.sha256(content.encode()).hexdigest()
        found.append(SourceFile(folder, folder.name, sum(path.stat().st_size for path in files), whole))
    if not found:
        raise UserError("the corpus is empty", wanted="at least one folder in data.paths")
    return tuple(found)


def _arrow_folder(path: Path, split: str) -> Path:
    if (path / "dataset_dict.json").is_file():
        if not (path / split / "state.json").is_file():
            raise UserError(f"{path}: there is no split {split!r}", remedy="name one of its folders in data.split")
        return path / split
    if not (path / "state.json").is_file():
        raise UserError(f"{path}: not a folder that save_to_disk wrote", wanted="state.json and .arrow files")
    return path


def read_arrow_folder(file: SourceFile, *, split: str) -> Iterator[Item]:
    """Rows of an arrow folder, mapped from the disk."""
    from datasets import load_from_disk

    row = 0
    try:
        for values in load_from_disk(str(file.path)):
            yield Item(f"{file.name}:{row}", f"{file.path}, row {row}", values)
            row += 1
    except UNREADABLE as error:
        raise UserError(f"{file.path}: cannot be read as arrow data at row {row}: {_first_line(error)}") from error


def open_hub(
    name: str, subset: str | None, split: str
) -> tuple[tuple[SourceFile, ...], Callable[[SourceFile], Iterator[Item]]]:
    """A dataset of the Hub, or of a folder laid out like one, downloaded into the library's cache."""
    dataset = load_hub(name, subset, split, streaming=False)
    digest = hashlib.sha256()
    for cached in dataset.cache_files:
        digest.update(sha256(cached["filename"]).encode())
    label = "/".join(part for part in (name, subset, split) if part)
    file = SourceFile(Path(name), label, int(dataset.dataset_size or 0), digest.hexdigest())

    def read(file: SourceFile) -> Iterator[Item]:
        for row, values in enumerate(dataset):
            yield Item(f"{file.name}:{row}", f"{file.name}, row {row}", values)

    return (file,), read


def load_hub(name: str, subset: str | None, split: str, *, streaming: bool) -> Any:
    """`datasets.load_dataset`, or a `UserError` with a remedy; code of a dataset is never run."""
    from datasets import load_dataset

    try:
        return load_dataset(name, subset, split=split, streaming=streaming)
    except (*UNREADABLE, RuntimeError) as error:  # ConnectionError is an OSError; a failed preparation a RuntimeError
        raise UserError(
            f"the dataset {name!r} cannot be opened: {_first_line(error)}",
            wanted=f"a dataset with a split {split!r}" + (f" in {subset!r}" if subset else ""),
            remedy="check data.name, data.subset and data.split; a machine without network needs local files",
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300] or type(error).__name__
