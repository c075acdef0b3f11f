"""Patterns with one threshold for the whole network: tile-wise (types 7 and 8) and single weights.

Scores are float64 `[K, N]` by path, masks bool of the same shape, True kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cook.sparsity.local import Masks, Scores, percentile, row_norms
from cook.sparsity.spec import PatternSpec


def unstructured(scores: Scores, percent: float) -> Masks:
    """Single weights, one percentile over the whole network."""
    threshold = percentile(torch.cat([score.flatten() for score in scores.values()]), percent)
    return {path: score > threshold for path, score in scores.items()}


def tile_wise_k(scores: Scores, spec: PatternSpec, percent: float) -> Masks:
    """Type 7: rows of tiles of G columns by norm / G, one percentile over the whole network.

    Raises:
        UserError: G does not divide the columns of some matrix.
    """
    size = spec.granularity
    norms = {path: row_norms(score, size, path) / size for path, score in scores.items()}
    threshold = percentile(torch.cat([values.flatten() for values in norms.values()]), percent)
    return {path: (values > threshold).repeat_interleave(size, dim=1) for path, values in norms.items()}


def tile_wise_kn(scores: Scores, previous: Mapping[str, torch.Tensor], spec: PatternSpec, percent: float) -> Masks:
    """Type 8: columns by their norm, then rows of tiles of G kept columns, both over the whole network.

    Args:
        scores: float64 `[K, N]` by path.
        previous: The masks of the previous stages.
        spec: G and the quirks. If both quirks of this type are off, the share per dimension is chosen so that
            the network as a whole keeps exactly the requested share, to the nearest row tile. If one is on,
            percentiles are used as in the original.
        percent: The sparsity in percent.
    """
    quirks = spec.quirks
    if quirks.per_dimension_sparsity:
        columns = _columns_above_percentile(scores, previous, percent, raw=quirks.raw_width_norms)
    else:
        columns = _columns_for_total(scores, previous, percent, raw=quirks.raw_width_norms)
    tiles = {path: _tiles(scores[path], previous[path], columns[path], spec) for path in scores}
    if quirks.per_dimension_sparsity:
        threshold = percentile(torch.cat([tile.norms_KT.flatten() for tile in tiles.values()]), percent)
        rows = {path: tile.norms_KT > threshold for path, tile in tiles.items()}
    else:
        rows = _rows_for_total(tiles, scores, percent)
    return {path: rows[path][:, tile.index_N] & columns[path] for path, tile in tiles.items()}


def _column_norms(score_KN: torch.Tensor, previous_KN: torch.Tensor, *, raw: bool) -> torch.Tensor:
    squares = score_KN.square().sum(0)
    return squares.sqrt() / len(score_KN) if raw else (squares / previous_KN.sum(0).clamp(min=1)).sqrt()


def _columns_above_percentile(scores: Scores, previous: Mapping[str, torch.Tensor], percent: float, *, raw: bool):
    norms = {path: _column_norms(score, previous[path], raw=raw) for path, score in scores.items()}
    threshold = percentile(torch.cat(list(norms.values())), percent)
    return {path: values > threshold for path, values in norms.items()}


def _columns_for_total(scores: Scores, previous: Mapping[str, torch.Tensor], percent: float, *, raw: bool):
    """Columns to keep: removes the lowest ones, so that an equal share of row tiles reaches the total."""
    norms = torch.cat([_column_norms(score, previous[path], raw=raw) for path, score in scores.items()])
    left = torch.cat([previous[path].sum(0) for path in scores])
    norms = torch.where(left > 0, norms, -1.0)  # empty columns are removed first
    rows = torch.cat([torch.full((score.shape[1],), len(score)) for score in scores.values()])
    order = norms.argsort(stable=True)
    gone = torch.arange(len(norms) + 1) / max(1, len(norms))
    entries, remaining = (_left_without(values[order]) for values in (rows, left))
    # The share that remains if a share `gone` of the columns and of the row tiles is removed.
    estimate = torch.minimum(entries * (1 - gone), remaining.double())
    target = float(entries[0]) * (1 - percent / 100)
    # Rows come after columns and can only remove more.
    distance = (estimate - target).abs().masked_fill(remaining < target, torch.inf)
    count = int(distance.argmin())
    kept = torch.ones(len(norms), dtype=torch.bool)
    kept[order[: max(count, int((left == 0).sum()))]] = False
    pieces = kept.split([score.shape[1] for score in scores.values()])
    return dict(zip(scores, pieces, strict=True))


def _left_without(values: torch.Tensor) -> torch.Tensor:
    """The sum that remains without the first n values, for every n."""
    return values.sum() - torch.cat([values.new_zeros(1), values.cumsum(0)])


@dataclass(frozen=True, kw_only=True)
class _Tiles:
    index_N: torch.Tensor
    """Index of the tile of every column."""
    norms_KT: torch.Tensor
    """Norm of every row of every tile."""
    kept_T: torch.Tensor
    """Number of columns that each tile keeps."""
    open_KT: torch.Tensor
    """Rows of tiles that were not empty after the previous stages."""


def _tiles(score_KN: torch.Tensor, previous_KN: torch.Tensor, kept_N: torch.Tensor, spec: PatternSpec) -> _Tiles:
    revive = spec.quirks.revive
    cut_N = _cuts(kept_N, spec.granularity) if revive else _cuts_inside(kept_N, previous_KN, spec.granularity)
    index_N = torch.cat([cut_N.new_zeros(1), cut_N[:-1].cumsum(0)]) if len(cut_N) else cut_N
    count = int(index_N[-1]) + 1 if len(index_N) else 0

    def by_tile(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(*values.shape[:-1], count).index_add_(-1, index_N, values)

    squares_KT = by_tile((score_KN * kept_N).square())
    kept_T, raw_T = by_tile(kept_N.long()), by_tile(torch.ones_like(index_N))
    if spec.quirks.raw_width_norms:
        norms = squares_KT.sqrt() / raw_T
    else:
        norms = (squares_KT / kept_T.clamp(min=1)).sqrt()
    return _Tiles(index_N=index_N, norms_KT=norms, kept_T=kept_T, open_KT=by_tile((previous_KN & kept_N).long()) > 0)


def _cuts(kept_N: torch.Tensor, size: int) -> torch.Tensor:
    """1 at every column after which a tile ends: at its `size`-th kept column, except the matrix's last column."""
    cut_N = (kept_N & (kept_N.cumsum(0) % size == 0)).long()
    cut_N[-1:] = 0
    return cut_N


def _cuts_inside(kept_N: torch.Tensor, previous_KN: torch.Tensor, size: int) -> torch.Tensor:
    """The same, but no tile crosses the border of a tile of the previous stage, where the kept rows change.

    So a row of a tile is either complete or removed, and removed rows stay removed.
    """
    patterns = [column.tobytes() for column in np.packbits(previous_KN.T.contiguous().numpy(), axis=1)]
    cut_N = torch.zeros(len(kept_N), dtype=torch.long)
    columns = kept_N.nonzero()[:, 0].tolist()
    count = 0
    for column, following in zip(columns, columns[1:], strict=False):
        count += 1
        if count == size or patterns[column] != patterns[following]:
            cut_N[column], count = 1, 0
    return cut_N


def _rows_for_total(tiles: Mapping[str, _Tiles], scores: Scores, percent: float) -> Masks:
    """Rows of tiles to keep: removes the lowest ones until the requested share is reached as closely as possible."""
    norms = torch.cat([torch.where(t.open_KT, t.norms_KT, -1.0).flatten() for t in tiles.values()])
    weights = torch.cat([(t.open_KT * t.kept_T).flatten() for t in tiles.values()])
    target = sum(score.numel() for score in scores.values()) * (1 - percent / 100)
    order = norms.argsort(stable=True)
    count = int((_left_without(weights[order]).double() - target).abs().argmin())
    kept = torch.ones(len(norms), dtype=torch.bool)
    kept[order[: max(count, int((norms < 0).sum()))]] = False
    pieces = kept.split([t.norms_KT.numel() for t in tiles.values()])
    return {path: piece.view_as(tiles[path].norms_KT) for path, piece in zip(tiles, pieces, strict=True)}
