"""The training data of a run: prepared by one process, then mapped by all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cook.base.errors import UserError
from cook.base.files import read_json, write_json
from cook.data.cache import fingerprint_of
from cook.data.packing import PackedRows, open_rows
from cook.data.prepare import open_split, open_tokenizer, prepare_rows, prepare_tokenizer, prepare_tokens
from cook.vocab.protocol import Tokenizer

POINTER = "data.json"
"""File in the output folder that tells where the prepared data is."""


class TrainingData(NamedTuple):
    """What a trainer reads."""

    tokenizer: Tokenizer
    train: PackedRows
    held_out: PackedRows


def load_rows(
    data: Any, tokenizer_config: Any, *, prompt_length: int, output_dir: str | Path, build: bool = True
) -> TrainingData:
    """Opens the tokenizer and the packed rows of a run.

    On several ranks: rank 0 calls it first, the others wait at a barrier and call it with `build=False`. They follow
    the pointer that rank 0 has left in the output folder, and neither list nor hash the corpus. The output folder and
    the cache must be visible to all ranks.

    Args:
        data: The configuration's data section (`type, paths, text_field, held_out, held_out_paths, max_length,
            cache_dir`).
        tokenizer_config: The configuration's tokenizer section (`type, path, vocab_size`).
        prompt_length: Prompt positions in front of every row.
        output_dir: The run's output folder; also holds the cache if `data.cache_dir` is None.
        build: Prepare what is missing or out of date. Otherwise only read.

    Raises:
        UserError: The corpus or tokenizer is unusable, or (`build=False`) nothing has been prepared for this
            configuration.
    """
    output = Path(output_dir)
    request = fingerprint_of(
        [data.type, list(data.paths), data.text_field, data.held_out, list(data.held_out_paths), data.max_length],
        [tokenizer_config.type, tokenizer_config.path, tokenizer_config.vocab_size],
        prompt_length,
    )
    if build:
        _prepare(data, tokenizer_config, prompt_length, output, request)
    pointer = read_json(output / POINTER)
    if pointer.get("request") != request:
        raise UserError(
            f"{output / POINTER}: the data was prepared for another configuration",
            remedy="prepare it again on one rank, with this configuration",
        )
    rows = Path(pointer["rows"])
    return TrainingData(
        open_tokenizer(tokenizer_config, Path(pointer["tokenizer"])),
        open_rows(rows, "train", prompt_length),
        open_rows(rows, "held_out", prompt_length),
    )


def _prepare(data: Any, tokenizer_config: Any, prompt_length: int, output: Path, request: str) -> None:
    cache = Path(data.cache_dir) if data.cache_dir is not None else output / "data"
    corpus = open_split(data)
    tokenizer_path = prepare_tokenizer(tokenizer_config, corpus, cache)
    tokenizer = open_tokenizer(tokenizer_config, tokenizer_path)
    tokens = prepare_tokens(corpus, tokenizer, cache)
    rows = prepare_rows(tokens, tokenizer, max_length=data.max_length, prompt_length=prompt_length, cache=cache)
    write_json(
        output / POINTER,
        {"request": request, "tokenizer": str(tokenizer_path.resolve()), "rows": str(rows.resolve())},
    )
