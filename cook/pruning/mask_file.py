"""Mask files: the guide's `.pt` dictionaries, each with a copy as safetensors; both are read strictly."""

from __future__ import annotations

import io
import reprlib
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from cook.base.errors import UserError
from cook.base.files import regular_file, write_atomically
from cook.base.tensor_files import load_pt
from cook.pruning.mask_set import COARSE_KEYS, FINE_KEYS, coarse_from_tensors, consistent, fine_from_tensors
from cook.pruning.units import PruningSpace

MAX_BYTES = 1 << 30
"""Files have one number per layer, head and FFN dimension: megabytes for the largest models."""


def write_mask_file(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes `tensors` to `path` (.pt) and to the same name with .safetensors, each atomically.

    If `path` itself ends in .safetensors, only that file is written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        write_atomically(path, buffer.getvalue())
    write_atomically(path.with_suffix(".safetensors"), save(tensors))


def read_mask_file(path: str | Path, *, required: tuple[str, ...], allowed: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Reads a mask file, or its safetensors copy, and checks keys, types and values.

    Raises:
        UserError: a missing or unknown key, a tensor that is not floating-point, or values other than 0 and 1.
    """
    if regular_file(path, "mask file").stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: too large for a mask file", wanted=f"at most {MAX_BYTES} bytes")
    content = _read_twin(Path(path)) if Path(path).suffix == ".safetensors" else load_pt(Path(path))
    missing, strange = [k for k in required if k not in content], [k for k in content if k not in allowed]
    if missing or strange:
        problem = f"lacks {missing[0]!r}" if missing else f"has the unknown key {reprlib.repr(strange[0])}"
        raise UserError(f"{path}: {problem}", wanted=f"the keys {', '.join(allowed)}", got=_listed(content))
    for key, value in content.items():
        if not _is_plain(value):
            kind = f"{value.dtype}, {value.layout}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(f"{path}: {key} is not a plain floating-point tensor", got=kind)
        odd = value[(value != 0) & (value != 1)]
        if odd.numel():
            raise UserError(f"{path}: {key} is not binary", wanted="0 and 1 only", got=f"{float(odd[0])}")
    return {key: value.detach().float() for key, value in content.items()}


def _read_twin(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own error type
        raise UserError(f"{path}: not a safetensors file", got=error) from None


def _listed(content: Mapping[Any, object]) -> str:
    return ", ".join(key if isinstance(key, str) and len(key) < 40 else reprlib.repr(key) for key in islice(content, 8))


def _is_plain(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    # An expanded view of one number takes no space in a file, and all memory once it is used.
    whole = value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    return whole and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_masks(
    space: PruningSpace,
    *,
    coarse: str | None = None,
    heads: str | None = None,
    experts: str | None = None,
    dimff: str | None = None,
    head_dims: str | None = None,
    hidden: str | None = None,
) -> dict[str, torch.Tensor]:
    """Reads all masks of a model from up to six files, by group name.

    A fine mask file may hold several kinds. The other kinds are used too, unless they have their own file.

    Raises:
        UserError: a file is not a mask file, belongs to another model, or contradicts another file.
    """
    masks: dict[str, torch.Tensor] = {}
    if coarse:
        required = ("self_att_layer_z", "ffn_layer_z")
        masks |= coarse_from_tensors(space, read_mask_file(coarse, required=required, allowed=COARSE_KEYS), coarse)
    blocks = dict(masks)
    files = {"heads": heads, "experts": experts, "dimff": dimff, "head_dims": head_dims, "hidden": hidden}
    contents = {
        kind: read_mask_file(path, required=(FINE_KEYS[kind],), allowed=tuple(FINE_KEYS.values()))
        for kind, path in files.items()
        if path
    }
    for given, content in contents.items():
        for kind, key in FINE_KEYS.items():
            if key in content and (kind == given or kind not in contents):
                masks |= fine_from_tensors(space, blocks, content, kind, str(files[given]))
    for key in FINE_KEYS.values():
        first, *others = [given for given, content in contents.items() if key in content] or [""]
        for other in others:
            if not torch.equal(contents[first][key], contents[other][key]):
                what = f"{files[first]} and {files[other]} hold different {key}"
                raise UserError(what, remedy="give masks of one run")
    return consistent(space, masks)
