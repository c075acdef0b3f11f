"""Models with fewer tokens: the rows of the embeddings and of the output projection that stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from cook.base.errors import UserError
from cook.base.files import read_json, write_json
from cook.base.tensor_files import LazyTensors
from cook.export.check import account, quiet
from cook.pruning.family import ModelSource
from cook.text.jieba import is_jieba
from cook.text.smaller import completed, renumbered
from cook.text.tokenizer import Tokenizer, load_tokenizer

FORMAT = "cook vocabulary"


def tokenizer_in(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if is_jieba(folder):
        return load_tokenizer("jieba", str(folder / "vocab.txt"))
    with quiet():
        return load_tokenizer("hf", str(folder))


def least_count(vocabulary: str) -> int | None:
    """N of `min_count=N`; None for the path of a file."""
    key, _, least = vocabulary.partition("=")
    if key != "min_count":
        return None
    if not least.isdecimal() or int(least) < 1:
        raise UserError(f"--vocabulary {vocabulary}", wanted="min_count=N with N at least 1, or a file")
    return int(least)


def read_vocabulary(path: str | Path, folder: Path) -> tuple[int, ...]:
    """The ids that stay, from a file that `cook data vocabulary` wrote for the tokenizer of `folder`.

    Raises:
        UserError: the file is another one, or was written for another tokenizer.
    """
    content = read_json(path)
    kept = content.get("kept") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(kept, list) or not all(isinstance(number, int) and number >= 0 for number in kept):
        raise UserError(f"{path}: not a vocabulary", wanted="the file that `cook data vocabulary --output` writes")
    found = tokenizer_in(folder).fingerprint
    if content.get("tokenizer") != found:
        raise UserError(
            f"{path}: was written for another tokenizer than that of {folder}",
            wanted=found[:12],
            got=str(content.get("tokenizer"))[:12],
            remedy=f"cook data vocabulary … --tokenizer {folder}",
        )
    return completed(folder, kept)


def write_vocabulary(path: Path, folder: Path, kept: Sequence[int], min_count: int) -> None:
    """Writes a file for `read_vocabulary`."""
    content = {"format": FORMAT, "tokenizer": tokenizer_in(folder).fingerprint, "min_count": min_count}
    write_json(path, content | {"kept": list(kept)})


def with_vocabulary(source: ModelSource, kept: Sequence[int]) -> ModelSource:
    """The same model with the tokens `kept` alone; nothing is read before it is used.

    Its logits are those of the whole model for these tokens.

    Args:
        source: The model.
        kept: Old ids, ascending; the place of an id is its new number.

    Raises:
        UserError: the model has fewer ids, or its files have the vocabulary of a head that it does not use.
    """
    if "vocab_size" not in source.config:
        raise UserError(
            f"{source.path}: the vocabulary of a model of several parts cannot be pruned",
            remedy="leave out --vocabulary",
        )
    size = source.config["vocab_size"]
    if kept[-1] >= size:
        raise UserError(
            f"{source.path}: the tokenizer has ids that the model lacks", wanted=f"below {size}", got=kept[-1]
        )
    with torch.device("meta"):
        model = source.adapter.build(source.config)
    names = _with_a_row_per_token(model, size)
    for name in account(source, source.adapter.space(source.config)).carried:
        if source.stored[name].shape[:1] == (size,):
            raise UserError(
                f"{source.path}: {name} has a row per token, and is not part of the model that config.json names",
                remedy="save the model with the class that uses it, or without it",
            )
    number = {old: new for new, old in enumerate(kept)}
    rows = torch.tensor(kept)
    readers: dict[str, Callable[[], torch.Tensor]] = {
        name: partial(_rows, source, name, rows) if name in names else partial(source.tensors.__getitem__, name)
        for name in source.tensors
    }
    config = renumbered(source.config, number) | {"vocab_size": len(kept)}
    return replace(source, config=config, tensors=LazyTensors(readers))


def _rows(source: ModelSource, name: str, rows: torch.Tensor) -> torch.Tensor:
    return source.tensors[name].index_select(0, rows)


def _with_a_row_per_token(model: torch.nn.Module, size: int) -> set[str]:
    """Names of the weights that have a row per token."""
    ends = [getattr(model, f"get_{kind}_embeddings", lambda: None)() for kind in ("input", "output")]
    paths = {path for path, module in model.named_modules() if any(module is end for end in ends)}
    names = {f"{path}.{part}" for path in paths for part in ("weight", "bias")}
    # The bias of BERT's prediction head is a weight of the head itself.
    names |= {name for name, weight in model.state_dict().items() if name.endswith("predictions.bias")}
    return {name for name, weight in model.state_dict().items() if name in names and weight.shape[0] == size}
