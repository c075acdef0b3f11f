"""Model folders that load anywhere: weights, config, tokenizer, the modeling file where stock code would not do."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from cook.base.files import write_json
from cook.base.tensor_files import ShardWriter, open_safetensors_folder
from cook.pruning.family import Adapter


class SavesTokenizer(Protocol):
    """A tokenizer that can write its own files."""

    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def save(self, folder: str | Path) -> None: ...


def write_model_folder(
    folder: Path,
    adapter: Adapter,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    shard_bytes: int = 2 << 30,
) -> None:
    """Writes weights (as they come, shard by shard), `config.json`, and the modeling file if the family needs one.

    The result loads with transformers' Auto classes, cook or no cook.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype, file_names = None, adapter.file_names(config)
    with ShardWriter(folder, shard_bytes) as writer:
        for name, tensor in tensors:
            dtype = dtype or str(tensor.dtype).removeprefix("torch.")
            writer.add(file_names.get(name, name), tensor)
    plain = dict(config) | {"dtype": dtype}
    modeling = adapter.modeling(config)
    if modeling:
        plain |= {"auto_map": dict(modeling.auto_map)}
        module = next(iter(modeling.auto_map.values())).split(".")[0]
        shutil.copyfile(modeling.file, folder / f"{module}.py")
    write_json(folder / "config.json", plain)


def write_tokenizer(folder: Path, tokenizer: SavesTokenizer) -> None:
    """Adds the tokenizer's files and a generation config that knows its special ids."""
    tokenizer.save(folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    write_json(folder / "generation_config.json", ids)


def copy_generation_config(source: Path, folder: Path) -> None:
    """Takes over how another model folder generates, if it says so."""
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


def write_live_format(folder: Path, adapter: Adapter, config: Mapping[str, Any], stem: str) -> str | None:
    """Adds the family's own `.pt` + JSON to a model folder, where that format can hold the model.

    Returns:
        None when written, else a sentence why the format cannot hold this model, or "" if the family has none.
    """
    live = adapter.live_config(config) if adapter.live_config else ""
    if isinstance(live, str):
        return live
    tensors = open_safetensors_folder(folder)
    # Through a file object: a full disk is an OSError then, and not an assertion of PyTorch's archive writer.
    with open(folder / f"{stem}.pt", "wb") as file:
        torch.save(dict(tensors.items()), file)  # mapped from the safetensors files, not read whole
    write_json(folder / f"{stem}.json", live)
    return None
