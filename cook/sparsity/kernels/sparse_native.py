"""Products of tiles and of single weights on a CPU, and the norm between them, in C.

An export carries this file along. Where `sparse_build.py` cannot build the C, the other ways of computing serve.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .sparse_build import library
from .sparse_memory import WORKSPACE


@dataclass(frozen=True)
class Panels:
    """A layer's weights as the source's `job` wants them."""

    product: str
    """The function that takes them."""
    inputs: int
    """K"""
    outputs: int
    """N"""
    weights: torch.Tensor
    read: torch.Tensor
    write: torch.Tensor
    biases: torch.Tensor
    first_weight: torch.Tensor
    first_output: torch.Tensor
    first_read: torch.Tensor
    reads: torch.Tensor
    is_paired: bool = False

    def __post_init__(self) -> None:
        entries = self.inputs // 2 if self.is_paired else self.inputs
        for what, values, count in (("read", self.read, entries), ("write", self.write, self.outputs)):
            if len(values) and not (0 <= int(values.min()) and int(values.max()) < count):
                raise ValueError(f"a damaged layer: to {what} {int(values.max())} of {count}")


class _Job(ctypes.Structure):
    """`job` of the source."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "y")]
    _fields_ += [(name, ctypes.c_int64) for name in ("inputs", "rows", "x_stride", "y_stride", "panels", "paired")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("first_weight", "first_output", "first_read", "reads")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("weights", "read", "write", "biases", "scratch")]
    _fields_ += [(name, ctypes.c_int64) for name in ("room", "threads")]


def instructions() -> str | None:
    """The vector instructions that the products were built for; None where there are no products."""
    found = library()
    if found is None:
        return None
    found.instructions.restype = ctypes.c_char_p
    return found.instructions().decode()


def has_native(x: torch.Tensor) -> bool:
    """Whether there are products for tensors like `x`: real, on a CPU, in a type that its processor multiplies."""
    if x.device.type != "cpu" or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return False
    if x.dtype == torch.float32:
        return library() is not None
    return x.dtype == torch.bfloat16 and (found := library()) is not None and bool(found.has_half())


def tile_panels(
    tiles: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    inputs: int,
    outputs: int,
    block: int,
) -> Panels:
    """The panels of tiles.

    Args:
        tiles: Of each its inputs `[R // block]`, its outputs `[C]`, weights `[C, R]` and biases `[C, 1]`.
        inputs: K.
        outputs: N.
        block: The inputs come in runs of this many.

    Raises:
        ValueError: a tile reads or writes what is not there.
    """
    found = library()
    assert found is not None
    weights, reads, writes, biases = [], [], [], []
    first_weight, first_output, first_read, counts = [0], [0], [], []
    at = 0
    for own_inputs, own_outputs, weight, bias in tiles:
        is_half = weight.dtype == torch.bfloat16
        each = max(1, block // 2 if is_half and block % 2 == 0 else block)
        read = (own_inputs[:, None].long() * each + torch.arange(each)).flatten()
        if is_half and block % 2 and len(read) % 2:  # the last input once more, with weights of 0
            read, weight = torch.cat([read, read[-1:]]), F.pad(weight, (0, 1))
        for panel in weight.tensor_split(max(1, -(-len(weight) // found.panel_outputs()))):
            # Weights of an input, in bf16 of a pair, lie side by side: 32 bits of each output.
            words = panel.clone(memory_format=torch.contiguous_format).view(torch.float32)
            weights.append(words.T.flatten())
            first_weight.append(first_weight[-1] + words.numel())
            first_output.append(first_output[-1] + len(panel))
            first_read.append(at)
            counts.append(len(read))
        at += len(read)
        reads.append(read)
        writes.append(own_outputs)
        biases.append(bias[:, 0].float())
    return Panels(
        product="product_of_half_tiles" if is_half else "product_of_tiles",
        inputs=inputs,
        outputs=outputs,
        weights=torch.cat(weights).view(torch.bfloat16 if is_half else torch.float32),
        read=torch.cat(reads).int(),
        write=torch.cat(writes).int(),
        biases=torch.cat(biases),
        first_weight=torch.tensor(first_weight),
        first_output=torch.tensor(first_output),
        first_read=torch.tensor(first_read),
        reads=torch.tensor(counts),
        is_paired=is_half and block % 2 == 0,
    )


def entry_panels(weight_NK: torch.Tensor, bias: torch.Tensor) -> Panels:
    """The panels of single weights, from a matrix in compressed rows; float32."""
    starts, outputs = weight_NK.crow_indices().long(), torch.arange(len(weight_NK) + 1)
    return Panels(
        product="product_of_entries",
        inputs=weight_NK.shape[1],
        outputs=len(weight_NK),
        weights=weight_NK.values(),
        read=weight_NK.col_indices().int(),
        write=outputs[:-1].int(),
        biases=bias.float(),
        first_weight=starts,
        first_output=outputs,
        first_read=starts,
        reads=starts.diff(),
    )


def multiply(panels: Panels, x_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    """Writes the outputs of the panels' tiles into `[N, M]`; those of no tile stay as they are.

    Raises:
        ValueError: activations that do not fit.
    """
    rows = x_KM.shape[1]
    if x_KM.shape != (panels.inputs, rows) or out_NM.shape != (panels.outputs, rows):
        raise ValueError(f"{panels.inputs} to {panels.outputs} features, got {(*x_KM.shape,)} and {(*out_NM.shape,)}")
    if not x_KM.dtype == out_NM.dtype == panels.weights.dtype:
        raise ValueError(f"weights in {panels.weights.dtype}, got {x_KM.dtype} and {out_NM.dtype}")
    if rows != 1 and not x_KM.stride(1) == out_NM.stride(1) == 1:
        raise ValueError("activations whose rows do not lie side by side")
    found, threads = library(), torch.get_num_threads()
    assert found is not None
    is_single = panels.product == "product_of_entries"
    room = (found.entry_room if is_single else found.tile_room)(ctypes.c_int64(panels.inputs))
    scratch = WORKSPACE.get("scratch", (threads * room + rows,), panels.biases)
    job = _Job(
        x=x_KM.data_ptr(),
        y=out_NM.data_ptr(),
        inputs=panels.inputs,
        rows=rows,
        x_stride=x_KM.stride(0),
        y_stride=out_NM.stride(0),
        panels=len(panels.reads),
        paired=panels.is_paired,
        scratch=scratch.data_ptr(),
        room=room,
        threads=threads,
        **{
            name: getattr(panels, name).data_ptr()
            for name in ("first_weight", "first_output", "first_read", "reads", "weights", "read", "write", "biases")
        },
    )
    getattr(found, panels.product)(ctypes.byref(job))


def add_and_norm(x_DM: torch.Tensor, y_DM: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """LayerNorm of x + y over the features, computed in float32 and written over x; both contiguous, `[D, M]`."""
    if not (x_DM.is_contiguous() and y_DM.is_contiguous() and x_DM.shape == y_DM.shape and x_DM.dtype == y_DM.dtype):
        raise ValueError("activations that differ in shape or type, or have gaps")
    found, (features, rows), threads = library(), x_DM.shape, torch.get_num_threads()
    assert found is not None
    weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
    scratch = WORKSPACE.get("scratch", (threads, features * found.norm_room()), weight)
    found.add_and_norm(
        ctypes.c_int(x_DM.dtype == torch.bfloat16),
        ctypes.c_void_p(x_DM.data_ptr()),
        ctypes.c_void_p(y_DM.data_ptr()),
        ctypes.c_int64(features),
        ctypes.c_int64(rows),
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(bias.data_ptr()),
        ctypes.c_float(norm.eps),
        ctypes.c_void_p(scratch.data_ptr()),
        ctypes.c_int64(threads),
    )
    return x_DM
