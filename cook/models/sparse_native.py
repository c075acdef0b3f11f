"""Products of tiles and of single weights on a CPU, and the norm between them, in C that the machine's compiler builds.

An export carries this file along. Without a C compiler, or with `COOK_NATIVE=0`, there are none of these, and the other
ways of computing serve. They are built at the first call and kept in the user's cache folder, by source and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .sparse_source import SOURCE

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Panels:
    """A layer's weights as the source's `job` wants them."""

    product: str
    """The function that takes them."""
    weights: torch.Tensor
    read: torch.Tensor
    write: torch.Tensor
    biases: torch.Tensor
    first_weight: torch.Tensor
    first_read: torch.Tensor
    first_panel: torch.Tensor
    is_paired: bool = False


class _Job(ctypes.Structure):
    """`job` of the source."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "y")]
    _fields_ += [(name, ctypes.c_int64) for name in ("inputs", "rows", "x_stride", "y_stride", "tiles", "paired")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("first_weight", "first_read", "first_panel", "weights")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("read", "write", "biases")]


def has_native(dtype: torch.dtype) -> bool:
    """Whether there is a product of tiles in `dtype` on this machine's processor."""
    if dtype == torch.float32:
        return library() is not None
    return dtype == torch.bfloat16 and (found := library()) is not None and bool(found.has_half())


def tile_panels(
    tiles: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]], block: int
) -> Panels:
    """The panels of tiles.

    Args:
        tiles: Of each its inputs `[R // block]`, its outputs `[C]`, weights `[C, R]` and biases `[C, 1]`.
        block: The inputs come in runs of this many.
    """
    found = library()
    assert found is not None
    size, pieces = found.panel_outputs(), []
    for inputs, outputs, weight, bias in tiles:
        is_half, is_paired = weight.dtype == torch.bfloat16, block % 2 == 0
        at_once = 2 if is_half and is_paired else 1
        each = max(1, block // at_once)
        read = (inputs[:, None].long() * each + torch.arange(each)).flatten()
        if is_half and len(read) % 2 and not is_paired:  # the last input once more, with weights of 0
            read, weight = torch.cat([read, read[-1:]]), F.pad(weight, (0, 1))
        missing = -len(outputs) % size
        panels = F.pad(weight, (0, 0, 0, missing)).unflatten(0, (-1, size))
        if is_half:
            panels = panels.unflatten(2, (-1, 2))
        weights = panels.transpose(1, 2).contiguous().flatten()
        write, biases = F.pad(outputs.long(), (0, missing), value=-1), F.pad(bias[:, 0].float(), (0, missing))
        pieces.append((weights, read, write, biases))
    weights, reads, writes, all_biases = zip(*pieces, strict=True)
    is_half = weights[0].dtype == torch.bfloat16
    return Panels(
        product="product_of_half_tiles" if is_half else "product_of_tiles",
        weights=torch.cat(weights), read=torch.cat(reads).int(), write=torch.cat(writes).int(),
        biases=torch.cat(all_biases), first_weight=_ends(len(w) // (2 if is_half else 1) for w in weights),
        first_read=_ends(map(len, reads)),
        first_panel=_ends(len(w) // size for w in writes), is_paired=is_half and block % 2 == 0,
    )  # fmt: skip


def entry_panels(weight_NK: torch.Tensor, bias: torch.Tensor) -> Panels:
    """The panels of single weights, from a matrix in compressed rows; float32."""
    starts, outputs = weight_NK.crow_indices().long(), torch.arange(len(weight_NK))
    return Panels(
        product="product_of_entries", weights=weight_NK.values(), read=weight_NK.col_indices().int(),
        write=outputs.int(), biases=bias.float(), first_weight=starts, first_read=starts,
        first_panel=torch.arange(len(weight_NK) + 1),
    )  # fmt: skip


def multiply(panels: Panels, x_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    """Writes the outputs of the panels' tiles into `[N, M]`; those of no tile stay as they are."""
    assert x_KM.dtype == out_NM.dtype == panels.weights.dtype
    assert x_KM.shape[1] == 1 or x_KM.stride(1) == out_NM.stride(1) == 1
    job = _Job(
        x=x_KM.data_ptr(), y=out_NM.data_ptr(), inputs=len(x_KM), rows=x_KM.shape[1],
        x_stride=x_KM.stride(0), y_stride=out_NM.stride(0), tiles=len(panels.first_panel) - 1, paired=panels.is_paired,
        **{name: getattr(panels, name).data_ptr()
           for name in ("first_weight", "first_read", "first_panel", "weights", "read", "write", "biases")},
    )  # fmt: skip
    getattr(library(), panels.product)(ctypes.byref(job))


def add_and_norm(x_DM: torch.Tensor, y_DM: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """LayerNorm of x + y over the features, computed in float32 and written over x; both contiguous, `[D, M]`."""
    assert x_DM.is_contiguous() and y_DM.is_contiguous() and x_DM.shape == y_DM.shape and x_DM.dtype == y_DM.dtype
    found, (features, rows) = library(), x_DM.shape
    assert found is not None
    weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
    found.add_and_norm(
        ctypes.c_int(x_DM.dtype == torch.bfloat16), ctypes.c_void_p(x_DM.data_ptr()), ctypes.c_void_p(y_DM.data_ptr()),
        ctypes.c_int64(features), ctypes.c_int64(rows), ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(bias.data_ptr()), ctypes.c_float(norm.eps),
    )  # fmt: skip
    return x_DM


def _ends(lengths: Iterable[int]) -> torch.Tensor:
    """Where each of these begins, and the last one ends."""
    return torch.tensor([0, *lengths]).cumsum(0)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The products, built now if they never were for this machine; None where that cannot be done."""
    if os.environ.get("COOK_NATIVE") == "0" or not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError, LookupError) as error:
        LOG.info("no native products of pruned matrices, others serve: %s", error)
        return None


def _built() -> Path:
    """The library's file.

    Raises:
        OSError, subprocess.SubprocessError, LookupError: there is no compiler, or it fails, or PyTorch has no OpenMP.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    # OpenMP has to be PyTorch's own: the threads of a second one would fight with them for the cores.
    loaded = re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\b\S*", Path("/proc/self/maps").read_text())
    loaded.sort(key=lambda path: not path.startswith(str(Path(torch.__file__).parent)))
    if not loaded:
        raise LookupError("PyTorch has loaded no OpenMP")
    facts = Path("/proc/cpuinfo").read_text()
    processor = sorted(set(re.findall(r"^(?:flags|Features|model name)\s*:.*$", facts, re.MULTILINE)))
    made_of = "\n".join([SOURCE, *compiler, loaded[0], *processor])
    folder = _folder()
    target = folder / f"sparse_{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / target.name
            flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wl,-z,defs", "-nodefaultlibs"]
            command = [*compiler, *flags, "-x", "c", "-", "-x", "none", loaded[0], "-lm", "-lc", "-o", str(made)]
            subprocess.run(command, input=SOURCE, text=True, check=True, capture_output=True, timeout=120)
            made.replace(target)
    return target


def _folder() -> Path:
    """A folder of the user's own: nobody else may put a library there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cook"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="cook-"))
