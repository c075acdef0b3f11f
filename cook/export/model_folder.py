"""Writing of model folders: files, and their atomic publication."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError

from cook.base.errors import RunFailed, UserError
from cook.base.files import fsync_folder, write_json
from cook.base.tensor_files import ShardWriter, open_safetensors_folder, put_away
from cook.pruning.family import Adapter


@contextmanager
def published(output: Path, *, source: Path) -> Iterator[Path]:
    """A context with a folder to write a model into; it replaces `output` if the block ends without an error.

    After an error the folder is removed, and an earlier export at `output` is unchanged. If `output` is a link to a
    folder, the folder is replaced and the link stays. `source` is the model that is read, which must not be replaced.

    Raises:
        UserError: `output` exists and is not an earlier export.
        RunFailed: a file cannot be written or read, inside the block too.
    """
    target = _target(output, source)
    aside, old = (target.with_name(f".{target.name}.{end}") for end in ("tmp", "old"))
    try:
        if old.exists() and not target.exists():  # an earlier run was killed between its two renames
            old.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        _flush(aside)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        fsync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise RunFailed(
            f"{output}: the model cannot be written: {_reason(error)}\n"
            f"  The incomplete result was removed. {source}, the masks and any earlier export are unchanged.\n"
            "  remedy: free space or repair the disk, then run the same command again"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _target(output: Path, source: Path) -> Path:
    try:
        target = output.resolve()
        beneath = (source.resolve(), *source.resolve().parents)
    except (OSError, RuntimeError):  # circular links
        raise UserError(f"{output}: a broken link", remedy="choose another folder") from None
    if target in beneath:
        raise UserError(f"{output}: would overwrite the original model", remedy="choose another folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"{output}: is a file", remedy="choose another folder")
    if target.is_mount():
        raise UserError(f"{output}: is a mount point, which cannot be replaced", remedy=f"write to {output}/model")
    if target.exists() and not (target / "config.json").exists() and any(target.iterdir()):
        raise UserError(f"{output}: the folder exists and does not contain a model", remedy="choose another folder")
    return target


def _flush(folder: Path) -> None:
    """Flushes every file to the disk; some systems report a full disk or a quota only then."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(parent))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


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
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes weights (as they arrive, shard by shard), `config.json`, and the modeling file if the family needs one.

    The result loads with transformers' Auto classes, without cook.

    Args:
        folder: The folder, made if missing.
        adapter: The family.
        config: The model's config.
        tensors: Names and weights.
        shard_bytes: The largest size of a file.
        dtype: The type that the config names; None: that of the first weight.
        metadata: Text to store in every file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file_names = adapter.file_names(config)
    with ShardWriter(folder, shard_bytes, metadata) as writer:
        for name, tensor in tensors:
            dtype = dtype or str(tensor.dtype).removeprefix("torch.")
            writer.add(file_names.get(name, name), tensor)
    plain = dict(config) | {"dtype": dtype}
    modeling = adapter.modeling(config)
    if modeling:
        plain |= {"auto_map": dict(modeling.auto_map)}
        module = next(iter(modeling.auto_map.values())).split(".")[0]
        shutil.copyfile(modeling.file, folder / f"{module}.py")
        for file in modeling.imported:
            shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", plain)


def write_tokenizer(folder: Path, tokenizer: SavesTokenizer) -> None:
    """Adds the tokenizer's files and a generation config with its special ids."""
    tokenizer.save(folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    write_json(folder / "generation_config.json", ids)


def copy_generation_config(source: Path, folder: Path) -> None:
    """Copies the generation config of another model folder, if there is one."""
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


class _PutsAway(io.RawIOBase):
    """A file whose writer does not keep in memory what it writes: the mapped tensors of `torch.save`."""

    def __init__(self, file: BinaryIO, tensors: Collection[torch.Tensor]):
        self._file, self._tensors = file, tensors
        self._since = 0

    def write(self, data: Any) -> int:
        written = self._file.write(data)
        self._since += written
        if self._since > 64 << 20:
            self._since = 0
            for tensor in self._tensors:
                put_away(tensor)
        return written


def write_live_format(folder: Path, adapter: Adapter, config: Mapping[str, Any], stem: str) -> str | None:
    """Adds the family's own `.pt` and JSON files to a model folder, if that format can store the model.

    Returns None if it can, else a sentence why not, or "" if the family has no format.
    """
    stored = open_safetensors_folder(folder)
    live = adapter.live_format(config, stored) if adapter.live_format else ""
    if isinstance(live, str):
        return live
    fields, weights = live
    other = folder / ".other"
    if weights is not stored:  # on the disk first, so that not all of them are in memory
        with ShardWriter(other) as writer:
            for name, tensor in weights.items():
                writer.add(name, tensor)
    tensors = dict(open_safetensors_folder(other if other.exists() else folder).items())  # mapped, not read
    # Through a file object, so that a full disk is an OSError and not an assertion of PyTorch's archive writer.
    with open(folder / f"{stem}.pt", "wb") as file:
        torch.save(tensors, _PutsAway(file, tensors.values()))  # type: ignore[arg-type]
    del tensors
    shutil.rmtree(other, ignore_errors=True)
    write_json(folder / f"{stem}.json", fields)
    return None
