"""DeepSpeed's checkpoint files, read without executing any code in them.

Under ZeRO 1 and 2 each rank's file holds a piece of every flat group of fp32 weights, with the position of each
parameter in it; under ZeRO 3 it holds the rank's share of every parameter in order. The optimizer's moments have the
same layout as the weights. The combined tensors can be loaded at any world size and any ZeRO stage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from cook.base.errors import UserError
from cook.base.faults import point
from cook.base.tensor_files import LazyTensors, load_pt, put_away, save_pt

TAG = "engine"  # the folder with DeepSpeed's files in a checkpoint
CLASSES = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""All classes that these files may contain besides tensors and plain values."""
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


class Stored:
    """Replaces an object of DeepSpeed: has its attributes but none of its code."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments


def read_shard(path: Path, classes: Iterable[Any] = (Stored,) * len(CLASSES), *, mmap: bool = False) -> dict:
    """Reads one of DeepSpeed's files with the restricted reader, with a replacement for each of `CLASSES`.

    Raises:
        UserError: the file is malformed, or it names another class, which is not loaded.
    """
    with safe_globals(list(zip(classes, CLASSES, strict=True))):
        return load_pt(path, mmap=mmap)


class ShardWriter:
    """Writes and reads DeepSpeed's checkpoint files; it has the methods of DeepSpeed's `CheckpointEngine`.

    A failed write is recorded and not raised, because DeepSpeed's own barriers wait for every rank. `classes` are
    DeepSpeed's, in the order of `CLASSES`.
    """

    def __init__(self, classes: Iterable[Any]):
        self._classes = tuple(classes)
        self.written: list[Path] = []
        self.failure: Exception | None = None

    def begin(self) -> None:
        self.written, self.failure = [], None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._attempt(lambda: Path(path).mkdir(parents=True, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        point("save.file")
        self.written.append(Path(path))
        self._attempt(lambda: save_pt(state_dict, Path(path)))

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # the other ranks must learn of any error, and this rank must reach the barrier
            self.failure = self.failure or error

    def load(self, path: str, map_location: Any = None) -> dict:
        return read_shard(Path(path), self._classes)

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True

    def cleanup(self) -> None:
        pass


class Shards:
    """The DeepSpeed checkpoint `folder/tag` of any ZeRO stage as whole tensors by name; tensors are mapped, not read.

    Raises:
        UserError: not a complete DeepSpeed checkpoint, or a file holds more than tensors and plain values.
    """

    def __init__(self, folder: Path, tag: str = TAG):
        self.folder = folder / tag
        matches = [(_OPTIMIZER_FILE.fullmatch(path.name), path) for path in self.folder.glob("*")]
        found = {int(match[1]): path for match, path in matches if match}
        models = sorted(self.folder.glob("*_model_states.pt"), key=_rank)
        if not models or sorted(found) != list(range(len(found))):
            raise UserError(f"{self.folder}: not a complete DeepSpeed checkpoint")
        self.model = read_shard(models[0], mmap=True)
        self._models = models
        try:
            self._ranks = [read_shard(found[rank], mmap=True)["optimizer_state_dict"] for rank in range(len(found))]
            self._partitioned = "fp32_flat_groups" in self._ranks[0] if self._ranks else False
            self._check_count()
            self._pieces = self._index()
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            what = f"{self.folder}: not a checkpoint in the format of DeepSpeed 0.19"
            raise UserError(what, got=repr(error)) from None

    def _check_count(self) -> None:
        counts = self._ranks[0]["partition_count"] if self._ranks else 0
        for count in counts if isinstance(counts, list) else [counts]:
            if count != len(self._ranks):
                what = f"{self.folder}: files of some ranks are missing"
                raise UserError(what, wanted=f"{count} files", got=len(self._ranks))

    def _index(self) -> dict[str, list[tuple[int, int, int, int]]]:
        """Rank, flat group, start and length of every piece, in order, by parameter name."""
        pieces: dict[str, list[tuple[int, int, int, int]]] = {}
        for rank, state in enumerate(self._ranks):
            if not self._partitioned:
                for group, mapping in enumerate(state["param_slice_mappings"]):
                    for name, address in mapping.items():
                        pieces.setdefault(name, []).append((rank, group, address.start, address.numel))
                continue
            for group, shapes in enumerate(self.model["param_shapes"]):
                start = 0
                for name, shape in shapes.items():
                    share = -(-math.prod(shape) // len(self._ranks))
                    pieces.setdefault(name, []).append((rank, group, start, share))
                    start += share
        return pieces

    def _flat(self, rank: int, group: int, key: str | None) -> torch.Tensor:
        state = self._ranks[rank]
        if key is None:
            return state["fp32_flat_groups" if self._partitioned else "single_partition_of_fp32_groups"][group]
        return self._base(state)["state"][group][key]

    def _base(self, state: dict) -> dict:
        return state["optimizer_state_dict" if self._partitioned else "base_optimizer_state"]

    def _whole(self, name: str, shape: Sequence[int], key: str | None) -> torch.Tensor:
        pieces = self._pieces[name]
        parts = [self._flat(rank, group, key).narrow(0, start, numel) for rank, group, start, numel in pieces]
        return _joined(parts, shape)

    def weights(self) -> LazyTensors:
        """Every weight in fp32 (frozen ones in the engine's type), and the persistent buffers."""
        module = {name: tensor.detach().clone for name, tensor in self.model["module"].items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model["module"].items()}
        if not self._ranks:
            return LazyTensors(module, shapes)
        readers: dict[str, Callable[[], torch.Tensor]] = {name: module[name] for name in self.model["buffer_names"]}
        frozen = self.model["frozen_param_shapes"] or {}
        shapes |= {name: tuple(shape) for name, shape in (frozen | self._shapes()).items()}  # ZeRO 3's module has none
        readers |= {name: partial(self._frozen, name, shape) for name, shape in frozen.items()}
        readers |= {name: partial(self._whole, name, shape, None) for name, shape in self._shapes().items()}
        for name in set(module) - set(readers) if not self._partitioned else ():
            readers[name] = module[name]  # frozen: ZeRO 1 does not list them separately
        for alias, name in (self.model["shared_params"] or {}).items():
            readers[alias], shapes[alias] = readers[name], shapes[name]
        return LazyTensors(readers, {name: shapes[name] for name in readers})

    def _shapes(self) -> dict[str, Sequence[int]]:
        return {name: shape for group in self.model["param_shapes"] for name, shape in group.items()}

    def _frozen(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        if not self._partitioned:
            return self.model["frozen_param_fragments"][name].reshape(tuple(shape))
        parts = [read_shard(path, mmap=True)["frozen_param_fragments"][name].flatten() for path in self._models]
        return _joined(parts, shape)

    def moments(self, trained: Sequence[str] | None = None) -> dict[str, LazyTensors]:
        """The optimizer's tensors per weight (Adam's `exp_avg`, `exp_avg_sq`), by key and parameter name.

        `trained` has the names of the trained parameters in the optimizer's order, in which ZeRO 0 numbers them. None:
        as the engine stored them; older checkpoints lack them.
        """
        trained = self.model.get("optimized", ()) if trained is None else trained
        if self._ranks:
            state, shapes = self._base(self._ranks[0])["state"].get(0, {}), self._shapes()
            keys = [key for key, value in state.items() if torch.is_tensor(value) and value.dim()]
            return {key: LazyTensors({n: partial(self._whole, n, shapes[n], key) for n in shapes}) for key in keys}
        states: dict[int, dict[str, Any]] = self.model["optimizer"]["state"]
        by_name = {name: states[number] for number, name in enumerate(trained) if number in states}
        first = next(iter(by_name.values()), {})
        keys = [key for key, value in first.items() if torch.is_tensor(value) and key != "step"]
        return {key: LazyTensors({n: partial(s.__getitem__, key) for n, s in by_name.items()}) for key in keys}

    def counters(self) -> dict[str, Any]:
        """The optimizer's counters, which are the same for all parameters: `step`."""
        states = self._base(self._ranks[0])["state"] if self._ranks else self.model["optimizer"]["state"]
        first = states.get(0, {})
        return {key: value for key, value in first.items() if not torch.is_tensor(value) or not value.dim()}

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups without parameters: learning rate and so on."""
        return (self._base(self._ranks[0]) if self._ranks else self.model["optimizer"])["param_groups"]

    def loss_scale_state(self) -> Mapping[str, Any]:
        """The attributes of fp16's loss scaler; empty if there is none."""
        return vars(self._ranks[0]["loss_scaler"]) if self._ranks else {}


def _joined(parts: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """The tensor of mapped pieces without its padding; one piece at a time is in memory beside it."""
    whole = torch.empty(math.prod(shape), dtype=parts[0].dtype)
    begin = 0
    for part in parts:
        target = whole[begin : begin + len(part)]
        target.copy_(part.detach()[: len(target)])
        put_away(part)
        begin += len(part)
    if begin < len(whole):
        what = "a weight of the checkpoint is cut off: its pieces do not have the numbers of its shape"
        raise UserError(what, wanted=len(whole), got=begin)
    return whole.reshape(tuple(shape))


def _rank(path: Path) -> int:
    match = re.match(r"zero_pp_rank_(\d+)_", path.name)
    return int(match[1]) if match else 0


def checkpoint_weights(folder: Path) -> Mapping[str, torch.Tensor]:
    """The fp32 weights in a checkpoint that `Engine.save` or DeepSpeed itself wrote, at any ZeRO stage.

    Raises:
        UserError: not a complete DeepSpeed checkpoint, or one that holds more than tensors and plain values.
    """
    tag = TAG
    if not (folder / TAG).is_dir():
        tag = (folder / "latest").read_text(errors="replace").strip()
        if not re.fullmatch(r"[\w.-]+", tag) or set(tag) == {"."} or not (folder / tag).is_dir():
            raise UserError(f"{folder / 'latest'}: names a folder that does not exist", got=repr(tag[:80]))
    return Shards(folder, tag).weights()
