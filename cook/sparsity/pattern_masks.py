"""Making masks from scores for any pattern, applying masks, and computing their sparsity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch

from cook.base.errors import UserError
from cook.sparsity import local, network
from cook.sparsity.local import Layer, Masks, Scores
from cook.sparsity.matrices import PrunedMatrix, layers_of
from cook.sparsity.spec import PatternSpec, Quirks

BY_LAYER: Mapping[str, Callable[[Layer, Scores, PatternSpec, float], Masks]] = {
    "whole_head": local.whole_heads,
    "head_size": local.sizes_of_heads,
    "granularity": local.by_granularity,
    "joint_qkv": local.joint_qkv,
    "local_kn": local.local_kn,
}
OF_HEADS = ("whole_head", "head_size")
BY_MATRIX: Mapping[str, Callable[[torch.Tensor, PatternSpec, float, str], torch.Tensor]] = {
    "vector_wise": lambda score, spec, percent, path: local.vector_wise(score, spec, percent),
    "block_wise": lambda score, spec, percent, path: local.block_wise(score, spec.block, percent, path),
    "m4n2_1d": lambda score, spec, percent, path: local.two_of_four(score, path),
    "m4n2_2d": lambda score, spec, percent, path: local.two_of_four_both_ways(score, path),
}


def make_masks(
    scores: Scores,
    matrices: Sequence[PrunedMatrix],
    spec: PatternSpec,
    *,
    sparsity: float,
    previous: Mapping[str, torch.Tensor] | None = None,
) -> Masks:
    """Makes the masks of one stage.

    Args:
        scores: Scores by path, each of its tensor's shape, not negative.
        matrices: The matrices to prune.
        spec: The pattern.
        sparsity: In percent; 2:4 patterns are always 50%.
        previous: Masks of the previous stage; None for a dense model.

    Returns:
        Masks by path, bool, True where kept, each of its tensor's shape.

    Raises:
        UserError: a size of the pattern does not divide a matrix evenly.
    """
    percent = spec.percent(sparsity)
    turned = {m.path: _turned(scores[m.path].double().cpu(), m) for m in matrices}
    before = {m.path: _turned(_previous(previous, m, scores[m.path].shape), m) for m in matrices}
    masks = _pattern(turned, before, matrices, spec, percent)
    if not (spec.quirks.revive and spec.name in ("vector_wise", "tile_wise_kn")):
        masks = {path: mask & before[path] for path, mask in masks.items()}
    return {m.path: _turned(masks[m.path], m).contiguous() for m in matrices}


def _pattern(
    scores: Scores, previous: Scores, matrices: Sequence[PrunedMatrix], spec: PatternSpec, percent: float
) -> Masks:
    if spec.name in BY_LAYER:
        parts = {m.path: m.parts if m.parts and spec.name in OF_HEADS else (m,) for m in matrices}
        seen: dict[str, torch.Tensor] = {}
        for path, those in parts.items():
            pieces = scores[path].split([part.outputs for part in those], dim=1)
            seen |= {part.path: piece for part, piece in zip(those, pieces, strict=True)}
        masks: Masks = {}
        for layer in layers_of(part for those in parts.values() for part in those).values():
            masks |= BY_LAYER[spec.name](layer, seen, spec, percent)
        return {path: torch.cat([masks[part.path] for part in those], dim=1) for path, those in parts.items()}
    if spec.name in BY_MATRIX:
        return {path: BY_MATRIX[spec.name](score, spec, percent, path) for path, score in scores.items()}
    if spec.name == "tile_wise_k":
        return network.tile_wise_k(scores, spec, percent)
    if spec.name == "tile_wise_kn":
        return network.tile_wise_kn(scores, previous, spec, percent)
    assert spec.name == "unstructured"
    return network.unstructured(scores, percent)


def _turned(tensor: torch.Tensor, matrix: PrunedMatrix) -> torch.Tensor:
    """Converts between a tensor of the state dict and `[K, N]`; its own inverse."""
    return tensor.T if matrix.input_dim == 1 else tensor


def _previous(previous: Mapping[str, torch.Tensor] | None, matrix: PrunedMatrix, shape: torch.Size) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool) if previous is None else previous[matrix.path].bool().cpu()


def apply_masks(target: torch.nn.Module | MutableMapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> None:
    """Sets pruned weights to 0 in place, in a module's parameters or in a dictionary of tensors."""
    tensors = dict(target.named_parameters()) if isinstance(target, torch.nn.Module) else target
    with torch.no_grad():
        for path, mask in masks.items():
            tensors[path].masked_fill_(~mask.to(tensors[path].device), 0.0)


@dataclass(frozen=True, kw_only=True)
class MatrixSparsity:
    """The sparsity of one matrix."""

    path: str
    role: str
    layer: int
    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """The pruned share, 0 to 1; a matrix without entries counts as pruned."""
        return 1.0 - self.kept / self.total if self.total else 1.0


@dataclass(frozen=True, kw_only=True)
class SparsityTable:
    """The sparsity of a set of masks."""

    rows: tuple[MatrixSparsity, ...]
    total: float
    """The pruned share of all entries, relative to the dense model."""
    of_stage: float
    """The share that this stage pruned of the weights that the previous stage kept; 1 if it kept none."""


def sparsity_table(
    matrices: Sequence[PrunedMatrix],
    masks: Mapping[str, torch.Tensor],
    previous: Mapping[str, torch.Tensor] | None = None,
    *,
    quirks: Quirks | None = None,
) -> SparsityTable:
    """Computes the sparsity of `masks` in total, per matrix, and relative to the previous stage.

    Raises:
        UserError: a matrix is empty, and the quirk `empty_ratio_fails` is on.
    """
    rows = tuple(
        MatrixSparsity(
            path=m.path, role=m.role, layer=m.layer, kept=int(masks[m.path].sum()), total=masks[m.path].numel()
        )
        for m in matrices
    )
    empty = [row.path for row in rows if not row.kept]
    if empty and quirks and quirks.empty_ratio_fails:
        raise UserError(
            f"{empty[0]}: all its weights are pruned, and the quirk divides by the number of kept weights",
            wanted="at least one weight in every matrix",
            got=f"{len(empty)} of {len(rows)} matrices empty",
            remedy="choose a lower sparsity, or remove the quirk empty_ratio_fails",
        )
    kept, total = sum(row.kept for row in rows), sum(row.total for row in rows)
    before = total if previous is None else sum(int(previous[m.path].sum()) for m in matrices)
    return SparsityTable(
        rows=rows,
        total=1.0 - kept / total if total else 1.0,
        of_stage=1.0 - kept / before if before else 1.0,
    )
