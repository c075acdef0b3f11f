"""Files of named tensors, read one tensor at a time and written in shards, without a second copy in memory."""

from __future__ import annotations

import json
import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cook.base.errors import UserError
from cook.base.files import fsync_folder, naming, read_json, regular_file, write_json

Shape = tuple[int, ...]
INDEX = "model.safetensors.index.json"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of torch.save before it used zip archives


class LazyTensors(Mapping[str, torch.Tensor]):
    """A mapping from names to tensors that reads a tensor on each access by its function in `readers`.

    `shapes` are those that are known without reading the tensors.
    """

    def __init__(self, readers: Mapping[str, Callable[[], torch.Tensor]], shapes: Mapping[str, Shape] | None = None):
        self._readers, self.shapes = dict(readers), dict(shapes or {})

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers  # the default would read the tensor


def known_shape(tensors: Mapping[str, torch.Tensor], name: str) -> Shape | None:
    """The shape of a tensor, or None if it is unknown without reading the tensor."""
    return tensors.shapes.get(name) if isinstance(tensors, LazyTensors) else tuple(tensors[name].shape)


def open_safetensors_folder(folder: Path) -> LazyTensors:
    """Opens the tensors of a Hugging Face folder: `model.safetensors`, or shards with an index, like transformers."""
    whole, index = folder / "model.safetensors", folder / INDEX
    if whole.is_file() or not index.is_file():
        return open_safetensors([whole])
    listed = _weight_map(index)
    tensors = open_safetensors([folder / name for name in sorted(set(listed.values()))])
    absent = [name for name in listed if name not in tensors]
    if absent:
        raise UserError(
            f"{index}: lists {absent[0]!r}, which none of the shards contains",
            remedy="download or save the folder again: the index and the shards do not belong together",
        )
    return tensors


def open_safetensors(files: Sequence[Path]) -> LazyTensors:
    """Opens the tensors of several safetensors files; a UserError if two of them contain a tensor of the same name."""
    readers: dict[str, Callable[[], torch.Tensor]] = {}
    shapes: dict[str, Shape] = {}
    for file in files:
        try:
            with safe_open(regular_file(file), framework="pt") as opened:
                found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        except UserError:
            raise
        except Exception as error:  # SafetensorError, or OSError for a file that is too short
            raise UserError(f"{file}: not a safetensors file", got=error) from None
        twice = readers.keys() & found.keys()
        if twice:
            raise UserError(f"{file}: another shard also contains {min(twice)!r}", remedy="save the folder again")
        readers |= {name: partial(_read_safetensors, file, name) for name in found}
        shapes |= found
    return LazyTensors(readers, shapes)


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: not a safetensors index", wanted="an object `weight_map` that maps names to files")
    for file in shards.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: names a shard outside its folder", got=repr(file))
    return shards


def _read_safetensors(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def load_pt(path: Path, *, mmap: bool = False) -> dict:
    """Reads, or maps into memory, a `.pt` file of plain tensors, without running any code from it.

    Raises:
        UserError: the file is not a zip archive written by `torch.save`, has a compressed or oversized member, or
            refers to a global that is not allowed.
    """
    path = regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            # Overlapping members would expand to more bytes than the file has.
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise UserError(f"{path}: the archive's members claim more bytes than the file has")
            for member in archive.infolist():
                # torch.save does not compress. A compressed member is a zip bomb or comes from another program.
                if member.compress_type != zipfile.ZIP_STORED or ".." in Path(member.filename).parts:
                    raise UserError(f"{path}: torch.save would not have written the archive member {member.filename!r}")
                if member.filename.endswith("data.pkl"):
                    if member.file_size > MAX_PICKLE_BYTES:
                        raise UserError(f"{path}: {member.filename} is too large for a list of tensor names")
                    _check_tuples(path, archive.read(member))
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except zipfile.BadZipFile:
        raise _not_an_archive(path) from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable .pt file of tensors", got=reason) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: contains a {type(content).__name__}", wanted="a dictionary of tensors")
    return content


MAX_PICKLE_BYTES = 32 << 20  # limit for the pickle of names and shapes: some hundred bytes per tensor
MAX_TUPLE = 100_000  # limit for the values in a tuple, including its inner tuples. torch.save writes only a few


def _check_tuples(path: Path, pickled: bytes) -> None:
    """Refuses deeply repeated tuples. Hashing one as a dictionary key could take years."""
    mark = 0
    stack, memo = [1], dict[object, int]()  # number of values in each object
    for op, arg, _ in pickletools.genops(pickled):
        if op.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if op.name == "MEMOIZE" else arg] = stack[-1]
        elif op.name == "MARK":
            stack.append(mark)
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(arg, 1))
        else:
            count, taken = 1, list(op.stack_before)
            if pickletools.markobject in taken:
                while stack and (top := stack.pop()) != mark:
                    count += top
                taken = taken[: taken.index(pickletools.markobject)]
            for _ in taken:
                count += stack.pop() if stack else 0
            is_tuple = op.name.startswith("TUPLE")
            if is_tuple and count > MAX_TUPLE:
                raise UserError(f"{path}: contains a tuple of more than {MAX_TUPLE} values", wanted="tensors by name")
            stack += [count if is_tuple else 1 for _ in op.stack_after]


def _not_an_archive(path: Path) -> UserError:
    with path.open("rb") as opened:
        is_legacy = opened.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
    if not is_legacy:
        return UserError(f"{path}: not a readable .pt file of tensors", got="not a zip archive written by torch.save")
    return UserError(
        f"{path}: this is the file format of torch.save before PyTorch 1.6",
        wanted="the zip format of current torch.save",
        remedy="load it with torch.load(path, weights_only=True) and save it again with torch.save",
    )


def save_pt(content: Any, path: Path) -> None:
    """Writes a file for `load_pt`. A failed write raises an `OSError` that names the file.

    It uses a Python file object, because PyTorch's own writer does not report why a write failed.
    """
    with naming(path), open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # After a failed write, closing the archive also fails, and hides the first error.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def open_pt(path: Path) -> Mapping[str, torch.Tensor]:
    """Opens a `.pt` state dict as `load_pt` does, with tensors mapped from the file; all values must be tensors."""
    content = load_pt(path, mmap=True)
    others = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(f"{path}: {others[0]!r} is not a tensor", wanted="a state dict: names and tensors")
    return content


class ShardWriter:
    """A context manager that writes tensors to a folder, made if missing, as safetensors shards with an index.

    It holds at most one shard in memory. If all tensors fit in one shard, it writes `model.safetensors` alone.
    """

    def __init__(self, folder: Path, shard_bytes: int = 2 << 30, metadata: Mapping[str, str] | None = None):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.metadata = {"format": "pt", **(metadata or {})}
        self.files: list[Path] = []
        self.names: list[list[str]] = []
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        file = self.folder / f"shard-{len(self.files):05d}.safetensors"
        self.files.append(file)
        try:
            save_file(self._pending, file, metadata=self.metadata)
        except SafetensorError as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from None
        self.names.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._clear()
            return
        try:
            self._flush()
        except BaseException:
            self._clear()
            raise
        # Readers would open the files of an earlier model instead of, or together with, these.
        for stale in (*self.folder.glob("model*.safetensors"), *self.folder.glob(INDEX)):
            stale.unlink()
        count = len(self.files)
        finals = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        finals = ["model.safetensors"] if count == 1 else finals
        for file, final in zip(self.files, finals, strict=True):
            file.chmod(0o644)  # safetensors makes its files readable only by their owner
            file.replace(self.folder / final)
        if count > 1:
            weight_map = {name: final for names, final in zip(self.names, finals, strict=True) for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / INDEX, index)
        fsync_folder(self.folder)

    def _clear(self) -> None:
        for file in self.files:
            file.unlink(missing_ok=True)


def read_model_config(folder: Path) -> dict:
    """Reads the `config.json` of a model folder; raises a UserError if it is not a JSON object."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: not a JSON object", got=json.dumps(config)[:80])
    return config
