"""Pattern masks on disk: one safetensors file, a bit a weight, with a record of the pattern that made them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from cook.base.errors import UserError
from cook.base.files import regular_file, write_atomically
from cook.sparsity.matrices import PrunedMatrix

RECORD = "pattern"
SHAPES = "shapes"
MAX_HEADER_BYTES = 100 << 20
"""What safetensors reads of a header at most."""


def write_pattern_masks(path: str | Path, masks: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
    """Writes `masks`, packed eight to a byte, and `record` (plain JSON data), atomically."""
    packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy().ravel())) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    described = {RECORD: json.dumps(dict(record), allow_nan=False), SHAPES: json.dumps(shapes)}
    write_atomically(path, save(packed, metadata=described))


def read_pattern_masks(
    path: str | Path, matrices: Sequence[PrunedMatrix]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads masks and their record, checked against the model's matrices.

    Raises:
        UserError: not such a file, damaged, or the masks of another model.
    """
    path = regular_file(path, "mask file")
    most = sum(prod(m.shape) // 8 + 1 for m in matrices) + MAX_HEADER_BYTES
    if path.stat().st_size > most:
        raise UserError(f"{path}: too large for the masks of this model", wanted=f"at most {most} bytes")
    try:
        with safe_open(path, framework="pt") as file:
            described = file.metadata() or {}
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        record, shapes = json.loads(described[RECORD]), json.loads(described[SHAPES])
        masks = {name: _unpacked(bits, shapes[name]) for name, bits in packed.items()}
    except Exception as error:  # safetensors' own errors, or what a stranger's file lets JSON and numpy raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a file of pattern masks", got=reason) from None
    wanted = {m.path: m.shape for m in matrices}
    found = {name: tuple(mask.shape) for name, mask in masks.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{path}: masks of another model or another choice of matrices, at {name}",
                wanted=wanted.get(name, "no mask"),
                got=found.get(name, "no mask"),
            )
    return masks, record


def _unpacked(bits: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    count = prod(shape)
    if bits.dtype != torch.uint8 or bits.numel() != (count + 7) // 8:
        raise ValueError("bits and shape do not agree")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool().view(*shape)
