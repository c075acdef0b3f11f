"""Patterns with thresholds per matrix or per layer: types 0 to 6, 2:4, and single weights.

Scores are float64 `[K, N]` (K inputs, N outputs, y = x @ W), masks bool of the same shape, True kept. Unless said
otherwise a threshold is the linear percentile of the norms, and strictly greater norms are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch

from cook.base.errors import UserError
from cook.sparsity.matrices import INPUTS, PrunedMatrix
from cook.sparsity.spec import PatternSpec

Layer = Mapping[str, list[PrunedMatrix]]
"""The matrices of a layer by role."""
Scores = Mapping[str, torch.Tensor]
Masks = dict[str, torch.Tensor]


def percentile(values: torch.Tensor, percent: float) -> float:
    """The linear percentile of all `values`; infinity if there are none."""
    return float(np.percentile(values.numpy(), percent)) if values.numel() else float("inf")


def granular(score_KN: torch.Tensor, size: int, percent: float, name: str) -> torch.Tensor:
    """Type 2 on one matrix: rows of tiles of `size` columns, each tile with its own percentile.

    Raises:
        UserError: `size` does not divide the number of columns.
    """
    norms_KT = row_norms(score_KN, size, name)
    if not norms_KT.numel():
        return torch.ones_like(score_KN, dtype=torch.bool)
    thresholds_T = torch.from_numpy(np.percentile(norms_KT.numpy(), percent, axis=0))
    return (norms_KT > thresholds_T).repeat_interleave(size, dim=1)


def row_norms(score_KN: torch.Tensor, size: int, name: str) -> torch.Tensor:
    """The L2 norm of every row over each tile of `size` columns, `[K, N / size]`.

    Raises:
        UserError: `size` does not divide the number of columns.
    """
    columns = score_KN.shape[1]
    if columns % size:
        raise UserError(
            f"{name}: the granularity does not divide the number of columns",
            wanted=f"a divisor of {columns}",
            got=size,
            remedy="choose another granularity",
        )
    return score_KN.unflatten(1, (-1, size)).square().sum(2).sqrt()


def whole_heads(layer: Layer, scores: Scores, spec: PatternSpec, percent: float) -> Masks:
    """Type 0: heads. The FFN's matrices (with the quirk also the attention output) use `granular`."""
    if spec.quirks.input_row_heads:
        return _input_rows(layer, scores, spec, percent, by_index=False)
    return _joint_heads(layer, scores, spec, percent, by_index=False)


def sizes_of_heads(layer: Layer, scores: Scores, spec: PatternSpec, percent: float) -> Masks:
    """Type 1: dimensions inside heads, the same in all heads of a layer."""
    if spec.quirks.input_row_heads:
        return _input_rows(layer, scores, spec, percent, by_index=True)
    return _joint_heads(layer, scores, spec, percent, by_index=True)


def _joint_heads(layer: Layer, scores: Scores, spec: PatternSpec, percent: float, *, by_index: bool) -> Masks:
    """Prunes heads (or with `by_index` dimensions of all heads) in the outputs of Q, K, V and the output's inputs.

    Queries that share keys and values form one head with them, so a head's size differs between matrices.
    """
    members = [m for role in (*INPUTS, "attention_output") for m in layer.get(role, [])]
    masks = _others(layer, scores, spec, percent, ("intermediate", "output"))
    if not members:
        return masks
    by_head: dict[str, torch.Tensor] = {}  # [heads, dimensions per head]
    for matrix in members:
        dim = 0 if matrix.role == "attention_output" else 1
        _divides(matrix.head_size, scores[matrix.path].shape[dim], matrix.path)
        by_head[matrix.path] = scores[matrix.path].square().sum(1 - dim).unflatten(0, (-1, matrix.head_size))
    size = min(matrix.head_size for matrix in members)
    _alike({path: x.shape[1] % size if by_index else x.shape[0] for path, x in by_head.items()})
    parts = [x.view(-1, size).sum(0) if by_index else x.sum(1) for x in by_head.values()]
    norms = torch.stack(parts).sum(0).sqrt()
    kept = norms > percentile(norms, percent)
    for matrix in members:
        units, own = by_head[matrix.path].shape
        whole = kept.repeat(units * own // size) if by_index else kept.repeat_interleave(own)
        along_inputs = matrix.role == "attention_output"
        masks[matrix.path] = (whole[:, None] if along_inputs else whole).expand_as(scores[matrix.path]).clone()
    return masks


def _alike(numbers: Mapping[str, int]) -> None:
    """Checks that all matrices have the same heads."""
    (first, number), *others = numbers.items()
    for path, other in others:
        if other != number:
            raise UserError(
                f"{first} and {path} have different numbers of heads",
                wanted=f"{number} in both",
                got=other,
                remedy="choose a pattern that does not prune heads",
            )


def _input_rows(layer: Layer, scores: Scores, spec: PatternSpec, percent: float, *, by_index: bool) -> Masks:
    masks = _others(layer, scores, spec, percent, ("attention_output", "intermediate", "output"))
    for matrix in (m for role in INPUTS for m in layer.get(role, [])):
        score = scores[matrix.path]
        _divides(matrix.head_size, score.shape[0], matrix.path)
        rows = score.square().sum(1).unflatten(0, (-1, matrix.head_size))
        norms = rows.sum(0 if by_index else 1).sqrt()
        kept = norms > percentile(norms, percent)
        whole = kept.repeat(len(rows)) if by_index else kept.repeat_interleave(matrix.head_size)
        masks[matrix.path] = whole[:, None].expand_as(score).clone()
    return masks


def _divides(head_size: int, units: int, path: str) -> None:
    if units % head_size:
        raise UserError(
            f"{path}: the head size does not divide its size", wanted=f"a divisor of {units}", got=head_size
        )


def _others(layer: Layer, scores: Scores, spec: PatternSpec, percent: float, roles: tuple[str, ...]) -> Masks:
    members = [m for role in roles for m in layer.get(role, [])]
    return {m.path: granular(scores[m.path], spec.granularity, percent, m.path) for m in members}


def by_granularity(layer: Layer, scores: Scores, spec: PatternSpec, percent: float) -> Masks:
    """Type 2: `granular` for every matrix."""
    return _others(layer, scores, spec, percent, tuple(layer))


def joint_qkv(layer: Layer, scores: Scores, spec: PatternSpec, percent: float) -> Masks:
    """Type 3: rows of Q, K and V together, which have the same input; one percentile over their joint norms."""
    members = [m for role in INPUTS for m in layer.get(role, [])]
    masks = _others(layer, scores, spec, percent, ("attention_output", "intermediate", "output"))
    if members:
        joint = torch.cat([scores[m.path] for m in members], dim=1)
        kept = granular(joint, joint.shape[1], percent, members[0].path) if joint.numel() else joint > 0
        pieces = kept.split([scores[m.path].shape[1] for m in members], dim=1)
        masks |= {m.path: piece.clone() for m, piece in zip(members, pieces, strict=True)}
    return masks


def vector_wise(score_KN: torch.Tensor, spec: PatternSpec, percent: float) -> torch.Tensor:
    """Type 4: keeps the k largest of every `vector` consecutive rows of a column, and ties with the k-th.

    A shorter last vector keeps the same share of its length.
    """
    whole = score_KN.shape[0] // spec.vector * spec.vector
    parts = [(score_KN[:whole], spec.vector), (score_KN[whole:], score_KN.shape[0] - whole)]
    return torch.cat([_largest(part, rows, spec, percent) for part, rows in parts if len(part)] or [score_KN > 0])


def _largest(score_KN: torch.Tensor, rows: int, spec: PatternSpec, percent: float) -> torch.Tensor:
    count = int((1.0 - percent / 100.0) * rows)
    vectors = score_KN.unflatten(0, (-1, rows))
    if count == 0 and spec.quirks.vector_keeps_all:
        return torch.ones_like(score_KN, dtype=torch.bool)
    if not score_KN.numel():
        return score_KN > 0
    least = vectors.topk(max(1, count), dim=1).values[:, -1:]
    return (vectors >= least).flatten(0, 1)


def block_wise(score_KN: torch.Tensor, size: int, percent: float, name: str) -> torch.Tensor:
    """Type 5: blocks of `size` × `size` by their Frobenius norm, with one percentile per matrix.

    Raises:
        UserError: `size` does not divide both sides.
    """
    for side, length in zip(("rows", "columns"), score_KN.shape, strict=True):
        if length % size:
            raise UserError(
                f"{name}: the block size does not divide the {side}",
                wanted=f"a divisor of {length}",
                got=size,
                remedy="choose another block size",
            )
    blocks = score_KN.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    norms = blocks.square().sum((1, 3)).sqrt()
    kept = norms > percentile(norms, percent)
    return kept.repeat_interleave(size, 0).repeat_interleave(size, 1)


def local_kn(layer: Layer, scores: Scores, spec: PatternSpec, percent: float) -> Masks:
    """Type 6: `granular` with its own granularity for Q, K and V, combined (and) with whole columns by their norms.

    The percentile applies to each of the two, so a matrix loses 1 − (1 − s)² of its weights.
    """
    masks = {}
    for role, members in layer.items():
        size = spec.local_granularities[0 if role in INPUTS else 1]
        for matrix in members:
            score = scores[matrix.path]
            norms = score.square().sum(0).sqrt()
            rows = granular(score, size, percent, matrix.path)
            masks[matrix.path] = rows & (norms > percentile(norms, percent))
    return masks


def two_of_four(score_KN: torch.Tensor, name: str) -> torch.Tensor:
    """`m4n2_1d`: keeps the two larger scores of every four consecutive inputs of an output; the first ones on ties.

    Raises:
        UserError: the number of inputs is not a multiple of four.
    """
    _fours(score_KN, name, (0,))
    groups = score_KN.unflatten(0, (-1, 4))
    order = groups.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :2], True).flatten(0, 1)


def two_of_four_both_ways(score_KN: torch.Tensor, name: str) -> torch.Tensor:
    """`m4n2_2d`: keeps two per row and column of every 4 × 4 block: the best of the 90 possible choices by its sum.

    So the transposed matrix of the backward pass is 2:4 as well (Hubara et al. 2021, "Accelerated sparse training").

    Raises:
        UserError: a side is not a multiple of four.
    """
    _fours(score_KN, name, (0, 1))
    rows = [[float(i in pair) for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    choices = [c for c in itertools.product(rows, repeat=4) if all(sum(column) == 2 for column in zip(*c, strict=True))]
    choices_P16 = torch.tensor(choices, dtype=score_KN.dtype).flatten(1)
    blocks = score_KN.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).permute(0, 2, 1, 3)
    best = (blocks.flatten(2) @ choices_P16.T).argmax(2)
    kept = choices_P16[best].unflatten(2, (4, 4)).permute(0, 2, 1, 3)
    return kept.flatten(2, 3).flatten(0, 1).bool()


def _fours(score_KN: torch.Tensor, name: str, dims: tuple[int, ...]) -> None:
    for dim in dims:
        if score_KN.shape[dim] % 4:
            raise UserError(
                f"{name}: 2:4 needs sizes that are multiples of 4", wanted="a multiple of 4", got=score_KN.shape[dim]
            )
