"""The matrices that a pattern prunes and their roles, from a pruning space or from weight names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cook.base.errors import UserError
from cook.pruning.counts import is_product
from cook.pruning.units import PruningSpace, UnitGroup

Role = Literal["query", "key", "value", "attention_output", "intermediate", "output"]
ROLES: tuple[Role, ...] = ("query", "key", "value", "attention_output", "intermediate", "output")
"""The roles, in the order of the matrices in a layer."""
INPUTS: tuple[Role, ...] = ("query", "key", "value")

ENCODER_ROLES: Mapping[str, Role] = {
    "attention.self.query.weight": "query",
    "attention.self.key.weight": "key",
    "attention.self.value.weight": "value",
    "attention.output.dense.weight": "attention_output",
    "intermediate.dense.weight": "intermediate",
    "output.dense.weight": "output",
}
"""Suffixes of names that stock encoders share; the longest match counts."""


@dataclass(frozen=True, kw_only=True)
class PrunedMatrix:
    """One matrix that a pattern prunes."""

    path: str
    """Key in the model's state dict."""
    role: Role
    layer: int
    shape: tuple[int, int]
    """Shape of the tensor in the state dict."""
    head_size: int
    """Size of a head, or of all queries that share a key head; used for the four attention matrices only."""
    input_dim: int = 1
    """The dimension of the tensor with the inputs (rows K of W): 1 as in torch.nn.Linear, else 0."""
    parts: tuple[PrunedMatrix, ...] = ()
    """The parts of a fused weight along its outputs, in order: all queries, all keys, all values."""

    @property
    def inputs(self) -> int:
        """K."""
        return self.shape[self.input_dim]

    @property
    def outputs(self) -> int:
        """N."""
        return self.shape[1 - self.input_dim]


def encoder_matrices(shapes: Mapping[str, Sequence[int]], *, head_size: int) -> tuple[PrunedMatrix, ...]:
    """The prunable matrices of a stock encoder, found by the suffixes of their names, in the order of layers and roles.

    Args:
        shapes: The shape of every weight in the state dict.
        head_size: Dimensions per head.

    Raises:
        UserError: there is no such weight.
    """
    found = []
    for path, shape in shapes.items():
        ends = [end for end in ENCODER_ROLES if path == end or path.endswith("." + end)]
        layer = re.search(r"(?:^|\.)(\d+)\.", path)
        if ends and layer and len(shape) == 2:
            role = ENCODER_ROLES[max(ends, key=len)]
            found.append(_matrix(path, role, int(layer[1]), shape, head_size, 1))
    if not found:
        raise UserError(
            "these are not the weights of an encoder", wanted=f"names that end in {', '.join(ENCODER_ROLES)}"
        )
    return _ordered(found)


def matrices_of(space: PruningSpace) -> tuple[PrunedMatrix, ...]:
    """The matrices that a family's pruning space describes, in the order of layers and roles.

    A matrix with units along its inputs is the last of its block (attention output, output); one with units along its
    outputs is the first. Gated FFNs have several `intermediate` per layer. A fused weight is one matrix, `query` if it
    contains queries, keys and values. If these are contiguous, head patterns use its parts; others use the whole.
    """
    found = []
    for group in space.groups:
        if group.kind == "layer" or group.active:  # patterns leave experts alone
            continue
        products = [s for s in group.slices if is_product(s.path, space.shapes[s.path])]
        pieces = list({s.path: s for s in products}.values())
        closing = _closing(group)
        opening = iter(INPUTS[1:] if group.kind == "keys" else INPUTS)
        for piece in pieces:
            role: Role
            if piece.path == closing:
                role = "attention_output" if group.site == "att" else "output"
            else:
                role = next(opening, "value") if group.site == "att" else "intermediate"
            input_dim = piece.dim if piece.path == closing else 1 - piece.dim
            matrix = _matrix(piece.path, role, group.layer, space.shapes[piece.path], piece.block, input_dim)
            found.append(replace(matrix, parts=_parts(matrix, group)) if group.site == "att" else matrix)
    return _ordered(found)


def _parts(matrix: PrunedMatrix, group: UnitGroup) -> tuple[PrunedMatrix, ...]:
    """The queries, keys and values of a fused weight; empty if it has only one of them or interleaves them."""
    slices = [s for s in group.slices if s.path == matrix.path]
    if len(slices) < 2:
        return ()
    made = []
    for role, piece in zip(INPUTS, sorted(slices, key=lambda s: s.offset), strict=True):
        size = group.size * piece.block
        shape = [size, size]
        shape[matrix.input_dim] = matrix.inputs
        name = f"{matrix.path}[{piece.offset}:{piece.offset + size}]"
        made.append(_matrix(name, role, matrix.layer, shape, piece.block, matrix.input_dim))
    return tuple(made)


def _closing(group: UnitGroup) -> str | None:
    """The path of the block's output matrix: the one at whose input the units are gated."""
    inside = [s.path for s in group.slices if s.path.startswith(f"{group.gate.module}.")]
    return inside[0] if inside else None


def restricted(
    matrices: Iterable[PrunedMatrix], suffixes: Sequence[str], aliases: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[PrunedMatrix, ...]:
    """The matrices whose paths end in one of `suffixes` (`pruned_module`) or in an alias of it (`aliases`).

    Raises:
        UserError: a suffix matches no matrix.
    """
    matrices = tuple(matrices)

    def fits(path: str, suffix: str) -> bool:
        spellings = (suffix, *(aliases or {}).get(suffix, ()))
        return any(path == end or path.endswith("." + end) for end in spellings)

    for suffix in suffixes:
        if not any(fits(m.path, suffix) for m in matrices):
            known = sorted({re.sub(r"^.*?\.\d+\.", "", m.path) for m in matrices})
            raise UserError(f"pruned_module: {suffix!r} matches no matrix of the model", wanted=", ".join(known))
    return tuple(m for m in matrices if any(fits(m.path, suffix) for suffix in suffixes))


def layers_of(matrices: Iterable[PrunedMatrix]) -> dict[int, dict[str, list[PrunedMatrix]]]:
    """Groups matrices by layer and role."""
    layers: dict[int, dict[str, list[PrunedMatrix]]] = defaultdict(lambda: defaultdict(list))
    for matrix in matrices:
        layers[matrix.layer][matrix.role].append(matrix)
    return {layer: dict(roles) for layer, roles in layers.items()}


def _matrix(path: str, role: Role, layer: int, shape: Sequence[int], head_size: int, input_dim: int) -> PrunedMatrix:
    sides = (int(shape[0]), int(shape[1]))
    return PrunedMatrix(path=path, role=role, layer=layer, shape=sides, head_size=head_size, input_dim=input_dim)


def _ordered(found: list[PrunedMatrix]) -> tuple[PrunedMatrix, ...]:
    return tuple(sorted(found, key=lambda m: (m.layer, ROLES.index(m.role))))
