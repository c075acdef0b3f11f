"""Tile-wise layers with int8 weights, and an encoder of them in one call.

An export carries this file along. K inputs, N outputs, M rows (tokens), C columns (outputs) of a tile, R rows of W
(inputs) that a tile reads.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .sparse_build import library
from .sparse_int8_source import SOURCE
from .sparse_layers import TileSizes, TileWiseLinear
from .sparse_memory import WORKSPACE

LARGEST = 127
"""Of a weight; -128 is not used."""


def int8_levels() -> int:
    """Steps that the products here round activations to: 255, or 127 without instructions for int8; 0 without AVX2."""
    found = library(SOURCE)
    return 0 if found is None else int(found.int8_levels())


def rounded(weight: torch.Tensor, sizes: TileSizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of tiles as int8, and the scale of each output in the tiles' order: the largest weight is ±127."""
    at, values, scales = 0, [], []
    for rows, columns in sizes:
        tile = weight[at : at + rows * columns].view(columns, rows).float()
        scale = tile.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        values.append((tile / scale[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8).flatten())
        scales.append(scale)
        at += rows * columns
    if not values:
        return torch.zeros(0, dtype=torch.int8), torch.zeros(0)
    return torch.cat(values), torch.cat(scales)


class Int8TileWiseLinear(nn.Module):
    """As `TileWiseLinear`, with weights in int8: `scale` times them are the weights of an output.

    Activations are rounded to 8 bits per row, from the lowest to the highest, and multiplied in int8 on a CPU that has
    the instructions. Else, and with gradients, it multiplies in floating point.

    Args:
        in_features: K.
        out_features: N.
        sizes: Of the tiles.
        block: Inputs come in runs of this many.
    """

    weight: torch.Tensor
    """int8"""
    scale: torch.Tensor
    """One of each output of a tile, tile after tile."""
    inputs: torch.Tensor
    outputs: torch.Tensor

    def __init__(self, in_features: int, out_features: int, sizes: TileSizes, *, block: int = 1):
        super().__init__()
        wide = TileWiseLinear(in_features, out_features, sizes, block=block)
        self.in_features, self.out_features, self.block, self.sizes = in_features, out_features, block, wide.sizes
        self.bias = wide.bias
        self.register_buffer("weight", torch.zeros(wide.weight.shape, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(wide.outputs.shape))
        self.register_buffer("inputs", wide.inputs)
        self.register_buffer("outputs", wide.outputs)
        self._wide: tuple[tuple, TileWiseLinear] | None = None

    def wide(self) -> TileWiseLinear:
        """The layer in floating point, made again when a tensor has changed."""
        state = tuple((t.data_ptr(), t.dtype, t.device) for t in (self.weight, self.scale, self.bias, self.inputs))
        if self._wide is None or self._wide[0] != state:
            layer = TileWiseLinear(self.in_features, self.out_features, self.sizes, block=self.block)
            layer.to(self.weight.device, self.bias.dtype)
            counts = torch.tensor([rows for rows, columns in self.sizes for _ in range(columns)], dtype=torch.long)
            scales = self.scale.float().repeat_interleave(counts.to(self.scale.device))
            with torch.no_grad():
                layer.weight.copy_(self.weight * scales)
            layer.weight.requires_grad_(False)
            layer.bias = self.bias
            layer.inputs, layer.outputs = self.inputs, self.outputs
            self._wide = (state, layer)
        return self._wide[1]

    def _apply(self, *arguments: Any, **named: Any) -> Any:
        self._wide = None
        return super()._apply(*arguments, **named)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_wide": None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]`."""
        if torch.is_grad_enabled() and (x.requires_grad or self.bias.requires_grad) or not _is_native(x):
            return self.wide()(x)
        return multiply(self, x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], -1)

    def columns(self, x_KM: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`[K, M]` to `[N, M]` in floating point, into `out` if given; no gradients."""
        return self.wide().columns(x_KM, out=out)

    def dense_weight(self) -> torch.Tensor:
        """W transposed, `[N, K]`, zeros where it is pruned."""
        return self.wide().dense_weight()

    def tiles(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of every tile its inputs `[R]`, outputs `[C]`, weights `[C, R]` and scales `[C]`.

        Outputs of no tile make one without inputs; so do no outputs.
        """
        at = row = column = 0
        inputs, outputs = self.wide().input_indices().long(), self.outputs.long()
        for rows, columns in self.sizes:
            own = slice(column, column + columns)
            weight = self.weight[at : at + rows * columns].view(columns, rows)
            yield inputs[row : row + rows], outputs[own], weight, self.scale[own]
            at, row, column = at + rows * columns, row + rows, column + columns
        bare = torch.ones(self.out_features, dtype=torch.bool)
        bare[outputs] = False
        count = int(bare.sum())
        if count or not self.sizes:
            yield inputs[:0], bare.nonzero()[:, 0], self.weight.new_zeros(count, 0), self.scale.new_zeros(count)


class _Matrix(ctypes.Structure):
    """`matrix` of the source."""

    _fields_ = [(name, ctypes.c_int64) for name in ("inputs", "outputs", "panels")]
    _fields_ += [
        (name, ctypes.c_void_p)
        for name in ("first_weight", "first_output", "first_read", "reads", "weights", "read", "write")
    ]
    _fields_ += [(name, ctypes.c_void_p) for name in ("scales", "sums", "biases")]


class _Layer(ctypes.Structure):
    """`layer` of the source."""

    _fields_ = [(name, _Matrix) for name in ("qkv", "attention_output", "intermediate", "output")]
    _fields_ += [("heads", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_float) for name in ("scale", "attention_eps", "output_eps")]
    _fields_ += [
        (name, ctypes.c_void_p) for name in ("attention_weight", "attention_bias", "output_weight", "output_bias")
    ]


class _Job(ctypes.Structure):
    """`job` of the source."""

    _fields_ = [("layers", ctypes.c_void_p), ("count", ctypes.c_int64), ("x", ctypes.c_void_p)]
    _fields_ += [("mask", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int64) for name in ("batch", "tokens", "hidden", "queries")]
    _fields_ += [(name, ctypes.c_int64) for name in ("widest_input", "widest_output", "head", "threads")]
    _fields_ += [("scratch", ctypes.c_void_p)]


def packed(layer: Int8TileWiseLinear) -> tuple[_Matrix, dict[str, torch.Tensor]]:
    """A layer as the source's `matrix`, and the tensors that it points to.

    Raises:
        ValueError: a tile reads or writes what is not there.
    """
    found = library(SOURCE)
    assert found is not None
    weights, reads, writes, scales, sums = [], [], [], [], []
    first_weight, first_output, first_read, counts = [0], [0], [], []
    at = 0
    for inputs, outputs, weight, scale in layer.tiles():
        missing = -len(inputs) % 4  # weights of 0
        read, weight = F.pad(inputs, (0, missing)), F.pad(weight, (0, missing))
        for panel in weight.tensor_split(max(1, -(-len(weight) // found.panel_outputs()))):
            weights.append(panel.unflatten(1, (-1, 4)).transpose(0, 1).flatten() if len(read) else panel.flatten())
            first_weight.append(first_weight[-1] + panel.numel())
            first_output.append(first_output[-1] + len(panel))
            first_read.append(at)
            counts.append(len(read))
        at += len(read)
        reads.append(read)
        writes.append(outputs)
        scales.append(scale.float())
        sums.append(weight.sum(1) * scale.float())
    tensors = {
        "first_weight": torch.tensor(first_weight),
        "first_output": torch.tensor(first_output),
        "first_read": torch.tensor(first_read),
        "reads": torch.tensor(counts),
        "weights": torch.cat(weights),
        "read": torch.cat(reads).int(),
        "write": torch.cat(writes).int(),
        "scales": torch.cat(scales),
        "sums": torch.cat(sums),
        "biases": layer.bias.detach().float()[torch.cat(writes)],
    }
    for what, count in (("read", layer.in_features), ("write", layer.out_features)):
        values = tensors[what]
        if len(values) and not (0 <= int(values.min()) and int(values.max()) < count):
            raise ValueError(f"a damaged layer: to {what} {int(values.max())} of {count}")
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    matrix = _Matrix(inputs=layer.in_features, outputs=layer.out_features, panels=len(counts), **pointers)
    return matrix, tensors


class _Packed:
    """An encoder's layers as the source wants them."""

    def __init__(self, layers: Sequence[Any]):
        self.kept: list[dict[str, torch.Tensor]] = []
        self.layers = (_Layer * len(layers))()
        self.widest_input = self.widest_output = self.head = 0
        for own, layer in zip(self.layers, layers, strict=True):
            for name in ("qkv", "attention_output", "intermediate", "output"):
                matrix, tensors = packed(getattr(layer, name))
                setattr(own, name, matrix)
                self.kept.append(tensors)
                self.widest_input = max(self.widest_input, matrix.inputs)
                self.widest_output = max(self.widest_output, matrix.outputs)
            norms = {
                "attention_weight": layer.attention_norm.weight,
                "attention_bias": layer.attention_norm.bias,
                "output_weight": layer.output_norm.weight,
                "output_bias": layer.output_norm.bias,
            }
            wide = {name: tensor.detach().float().contiguous() for name, tensor in norms.items()}
            self.kept.append(wide)
            for name, tensor in wide.items():
                setattr(own, name, tensor.data_ptr())
            own.heads, own.scale = layer.heads, layer.scale
            own.attention_eps, own.output_eps = layer.attention_norm.eps, layer.output_norm.eps
            self.head = max(self.head, layer.attention_output.in_features // max(1, layer.heads))


_KEPT: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Any]] = weakref.WeakKeyDictionary()


def _kept(owner: nn.Module, make: Callable[[], Any]) -> Any:
    """What was made of a module's tensors; made again when one has changed. It is not copied or saved with it."""
    state = tuple(
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for tensor in (*owner.parameters(), *owner.buffers())
    )
    found = _KEPT.get(owner)
    if found is None or found[0] != state:
        found = _KEPT[owner] = (state, make())
    return found[1]


def _is_native(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and type(x) in (torch.Tensor, nn.Parameter) and x.numel() > 0 and int8_levels() > 0


def _scratch(size: int) -> tuple[torch.Tensor, int]:
    """Memory, and where in it a line of a cache begins."""
    memory = WORKSPACE.get("int8 scratch", (size + 64,), torch.empty(0, dtype=torch.uint8))
    return memory, memory.data_ptr() + -memory.data_ptr() % 64


def multiply(layer: Int8TileWiseLinear, x_MK: torch.Tensor, *, is_gelu: bool = False) -> torch.Tensor:
    """A layer's product in int8, `[M, N]`, and GELU of it; `x_MK` on a CPU for which `int8_levels` is not 0."""
    found, (rows, inputs) = library(SOURCE), x_MK.shape
    assert found is not None
    if inputs != layer.in_features:
        raise ValueError(f"{layer.in_features} features, got {inputs}")
    matrix, _ = _kept(layer, lambda: packed(layer))
    x, y = x_MK.float().contiguous(), torch.empty(rows, layer.out_features)
    found.product_room.restype = ctypes.c_int64
    room = found.product_room(ctypes.c_int64(inputs), ctypes.c_int64(layer.out_features))
    memory, start = _scratch(torch.get_num_threads() * room)
    found.multiply(
        ctypes.byref(matrix),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_int(is_gelu),
        ctypes.c_void_p(start),
        ctypes.c_int64(torch.get_num_threads()),
    )
    del memory
    return y.to(x_MK.dtype)


def can_encode(layers: Sequence[Any], x: torch.Tensor) -> bool:
    """Whether `encode` takes these layers and activations: int8 weights, GELU, on a CPU that has the instructions."""
    is_int8 = all(isinstance(layer.qkv, Int8TileWiseLinear) and layer.is_gelu for layer in layers)
    return len(layers) > 0 and is_int8 and _is_native(x)


def encode(owner: nn.Module, layers: Sequence[Any], x_BTD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The layers' result, `[B, T, D]`; no gradients.

    Args:
        owner: The module that the layers belong to; packed weights are kept while it exists.
        layers: `SparseLayer`s that `can_encode` accepts.
        x_BTD: Activations, in any floating type; the computation is in int8 and fp32.
        mask: Added to the scores, `[1 or B, 1, 1 or T, T]`.

    Raises:
        ValueError: activations or a mask that do not fit.
    """
    found, (batch, tokens, hidden) = library(SOURCE), x_BTD.shape
    assert found is not None
    own = _kept(owner, lambda: _Packed(layers))
    if any(layer.qkv.in_features != hidden or layer.output.out_features != hidden for layer in layers):
        raise ValueError(f"layers of another width than the activations' {hidden}")
    out = x_BTD.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    added, queries = _added(mask, batch, tokens, int(found.block_tokens()))
    threads = torch.get_num_threads()
    job = _Job(
        layers=ctypes.addressof(own.layers),
        count=len(layers),
        x=out.data_ptr(),
        mask=None if added is None else added.data_ptr(),
        batch=batch,
        tokens=tokens,
        hidden=hidden,
        queries=queries,
        widest_input=own.widest_input,
        widest_output=own.widest_output,
        head=own.head,
        threads=threads,
    )
    found.room.restype = ctypes.c_int64
    memory, job.scratch = _scratch(found.room(ctypes.byref(job)))
    found.encode(ctypes.byref(job))
    del memory
    return out.to(x_BTD.dtype)


def _added(mask: torch.Tensor | None, batch: int, tokens: int, block: int) -> tuple[torch.Tensor | None, int]:
    """A mask as `[B, keys, queries]` in fp32, and the number of its queries, which is 1 if they are all the same."""
    if mask is None:
        return None, 1
    if mask.shape[1] != 1 or mask.shape[2] not in (1, tokens) or mask.shape[3] != tokens:
        raise ValueError(f"a mask of another size than [B, 1, {tokens}, {tokens}]: {(*mask.shape,)}")
    mask = mask.float().expand(batch, 1, -1, -1)
    if mask.shape[2] > 1 and mask.stride(2) != 0 and not torch.equal(mask, mask[:, :, :1].expand_as(mask)):
        turned = F.pad(mask[:, 0].transpose(1, 2), (0, -tokens % block))
        return turned.contiguous(), turned.shape[2]
    return mask[:, 0, 0].contiguous(), 1
