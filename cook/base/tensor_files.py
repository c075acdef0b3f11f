"""Files of named tensors, read one tensor at a time and written in shards, without a second copy in memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from cook.base.errors import UserError
from cook.base.files import fsync_folder, naming, read_json, regular_file, write_json

PAGEOUT = 21  # Linux's MADV_PAGEOUT, which never loses what is not in a file
Shape = tuple[int, ...]
INDEX = "model.safetensors.index.json"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of torch.save before it used zip archives


class LazyTensors(Mapping[str, torch.Tensor]):
    """A mapping from names to tensors that reads a tensor on each access by its function in `readers`.

    `shapes` are those that are known without reading the tensors, and `parts` the names in the files of what a tensor
    is made of, if there are several.
    """

    def __init__(
        self,
        readers: Mapping[str, Callable[[], torch.Tensor]],
        shapes: Mapping[str, Shape] | None = None,
        parts: Mapping[str, Sequence[str]] | None = None,
    ):
        self._readers, self.shapes, self.parts = dict(readers), dict(shapes or {}), dict(parts or {})

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


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    """The shapes of all tensors; only those of unknown shape are read."""
    known = {name: known_shape(tensors, name) for name in tensors}
    return {name: tuple(tensors[name].shape) if shape is None else shape for name, shape in known.items()}


def put_away(tensor: torch.Tensor) -> None:
    """Gives the memory of a tensor that is mapped from a file back to the system, which reads it again when it is used.

    The system would do so when it needs the memory; until then it counts as used by the process. This does nothing to
    tensors in memory, and where the system cannot do it.
    """
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - begin)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), size, PAGEOUT)


@torch.no_grad()
def in_parts(
    change: Callable[..., torch.Tensor], tensor: torch.Tensor, *others: torch.Tensor, numel: int = 1 << 22
) -> torch.Tensor:
    """`change` of every element, in the tensor's type, computed on about `numel` elements at a time.

    So the intermediate results in a wider type need little memory. `others` broadcast to the tensor's shape; `change`
    receives a part of each.
    """
    tensor = tensor.detach()
    out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    if not tensor.numel():
        return out
    rows = max(1, numel * tensor.shape[0] // tensor.numel()) if tensor.dim() else 1
    read = [tensor, *(other.expand(tensor.shape) for other in others)]
    parts = [each.split(rows) for each in (out, *read)] if tensor.dim() else [[each] for each in (out, *read)]
    for target, *part in zip(*parts, strict=True):
        target.copy_(change(*part))
    return out


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
            remedy = "copy or download the file again, if it is not whole"
            raise UserError(f"{file}: not a safetensors file", got=error, remedy=remedy) from None
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


BUFFERED = 64 << 20  # bytes in memory before a shard is begun on the disk
BESIDE = 192 << 20  # bytes that may be written while the caller makes the next tensors
HEADER = 256 << 10  # bytes for the names and shapes of a shard that is begun before all of its tensors are known
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of the types in safetensors files."""


class ShardWriter:
    """A context manager that writes tensors to a folder, made if missing, as safetensors shards with an index.

    It holds at most one tensor, or `BESIDE` bytes that a thread writes, and `BUFFERED` bytes in memory. If all tensors
    fit in one shard, it writes `model.safetensors` alone. Tensors must stay unchanged until the context ends.
    """

    def __init__(self, folder: Path, shard_bytes: int = 2 << 30, metadata: Mapping[str, str] | None = None):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.metadata = {"format": "pt", **(metadata or {})}
        self.files: list[Path] = []
        self.names: list[list[str]] = []
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._file: BinaryIO | None = None  # the shard that is being written
        self._entries: dict[str, dict[str, Any]] = {}  # the header of its tensors
        self._reserved = 0  # bytes of the header's place in it
        self._written = 0  # bytes of tensors in it
        self._room = 0  # bytes that its header needs at most, with what is pending

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        held, room = self._written + self._pending_bytes, len(json.dumps(name)) + 20 * tensor.dim() + 100
        if held and (held + tensor.nbytes > self.shard_bytes or self._room + room > HEADER):
            self._finish()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._room += room
        self.total_bytes += tensor.nbytes
        if self._pending_bytes >= BUFFERED:
            self._write()

    def _write(self, *, is_all: bool = False) -> None:
        """Begins to write what is pending; unless that is a whole shard, the header's place is reserved before it."""
        self._wait()
        # Readers map the file: an offset must be a multiple of the type's size, and no bytes may lie between tensors.
        pending = dict(sorted(self._pending.items(), key=lambda item: -item[1].element_size()))
        if self._file is not None and self._written % next(iter(pending.values())).element_size():
            self._pending, room = {}, self._room
            self._finish()
            self._room = room
        for name, tensor in pending.items():
            begin, self._written = self._written, self._written + tensor.nbytes
            kind, shape = TYPES[tensor.dtype], list(tensor.shape)
            self._entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, self._written]}
        if self._file is None:
            self.files.append(self.folder / f"shard-{len(self.files):05d}.safetensors")
            self._reserved = 0 if is_all else HEADER + len(json.dumps(self.metadata))
            self._file = open(self.files[-1], "wb")  # noqa: SIM115  # open from one tensor to the next
            with naming(self.files[-1]):
                self._file.write(self._header())
        tensors, num_bytes = list(pending.values()), self._pending_bytes
        self._pending, self._pending_bytes = {}, 0
        self._writing = self._thread.submit(_write_tensors, self._file, self.files[-1], tensors)
        del pending
        if num_bytes > BESIDE:
            self._wait()

    def _wait(self) -> None:
        """Until what was begun is written; raises what the writing raised."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _header(self) -> bytes:
        text = json.dumps({"__metadata__": self.metadata, **self._entries}, separators=(",", ":")).encode()
        text = text.ljust(max(self._reserved, -(-len(text) // 8) * 8))  # the format allows spaces at the end
        return len(text).to_bytes(8, "little") + text

    def _finish(self) -> None:
        """Completes the shard."""
        if self._pending or self._file is None:
            self._write(is_all=self._file is None)
        self._wait()
        assert self._file is not None
        with naming(self.files[-1]), self._file as file:
            file.seek(0)
            file.write(self._header())
        self.names.append(list(self._entries))
        self._file, self._entries = None, {}
        self._written = self._room = 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._clear()
            return
        try:
            self._finish()
        except BaseException:
            self._clear()
            raise
        self._thread.shutdown()
        # Readers would open the files of an earlier model instead of, or together with, these.
        for stale in (*self.folder.glob("model*.safetensors"), *self.folder.glob(INDEX)):
            stale.unlink()
        count = len(self.files)
        finals = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        finals = ["model.safetensors"] if count == 1 else finals
        for file, final in zip(self.files, finals, strict=True):
            file.replace(self.folder / final)
        if count > 1:
            weight_map = {name: final for names, final in zip(self.names, finals, strict=True) for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / INDEX, index)
        fsync_folder(self.folder)

    def _clear(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is buffered cannot be written either
                self._file.close()
        for file in self.files:
            file.unlink(missing_ok=True)


def _write_tensors(file: BinaryIO, path: Path, tensors: list[torch.Tensor]) -> None:
    """Writes tensors one after the other, and drops each."""
    with naming(path):
        while tensors:
            flat = tensors.pop(0).detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def read_model_config(folder: Path) -> dict:
    """Reads the `config.json` of a model folder; raises a UserError if it is not a JSON object."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: not a JSON object", got=json.dumps(config)[:80])
    return config
