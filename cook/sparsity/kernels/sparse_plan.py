"""A pruned layer's weights, laid out for the ways of computing its product.

An export carries this file along; it needs PyTorch alone.

    K inputs, N outputs, M rows, T tiles, C columns (outputs) of a tile, R rows of W (inputs) that a tile reads
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .sparse_memory import WORKSPACE
from .sparse_native import Panels, entry_panels, tile_panels

MOST_PADDING = 1.15
"""Tiles of unequal sizes are padded for one batched product up to this growth."""


@dataclass(frozen=True)
class Tile:
    """A tile's views of its layer's tensors."""

    inputs: torch.Tensor
    """Which inputs it reads (which blocks of them, in a block-wise layer)."""
    outputs: torch.Tensor
    """Which outputs it makes."""
    weight: torch.Tensor
    """`[C, R]`"""
    bias: torch.Tensor
    """`[C, 1]`"""
    rows: int
    """R"""


@dataclass(frozen=True)
class Bucket:
    """Tiles of as many outputs and about as many inputs, for one batched product."""

    inputs: torch.Tensor
    """`[T · R]`, padded with the first one; blocks of inputs where they come so."""
    weights: torch.Tensor
    """`[T, C, R]`, padded with zeros."""
    biases: torch.Tensor
    """`[T, C, 1]`"""
    outputs: torch.Tensor
    """`[T · C]`"""


class Plan:
    """A layer's weights laid out for its ways of computing, and the way chosen for each kind of activations.

    Args:
        layer: A `TileWiseLinear`.
    """

    def __init__(self, layer: Any):
        self.layer = layer
        self.weight, self.bias = layer.weight.detach(), layer.bias.detach()
        outputs = layer.outputs.long()
        self.in_order = torch.equal(outputs, torch.arange(layer.out_features, device=outputs.device))
        covered = torch.zeros(layer.out_features, dtype=torch.bool, device=outputs.device)
        covered[outputs] = True
        self.outputs, self.bare = outputs, (~covered).nonzero()[:, 0]
        self.bare_bias = self.bias[self.bare, None]
        self.tiles = list(self._tiles())
        self.input_counts = sorted({tile.rows for tile in self.tiles})
        self.output_counts = [len(tile.weight) for tile in self.tiles]
        self.most_inputs = max(self.input_counts, default=0)
        self.chosen: dict[tuple, Callable[..., None]] = {}
        # A tile can be full of zeros where the mask is of single weights or vectors.
        self.share = int(self.weight.count_nonzero()) / max(1, layer.in_features * layer.out_features)

    def _tiles(self):
        at = row = column = 0
        block, inputs = self.layer.block, self.layer.inputs
        for rows, columns in self.layer.sizes:
            lines = self.outputs[column : column + columns]
            yield Tile(
                inputs=inputs[row // block : (row + rows) // block].contiguous(),
                outputs=lines,
                weight=self.weight[at : at + rows * columns].view(columns, rows),
                bias=self.bias[lines, None],
                rows=rows,
            )
            at, row, column = at + rows * columns, row + rows, column + columns

    @cached_property
    def dense(self) -> torch.Tensor:
        """`[N, K]`"""
        return self.layer.dense_weight()

    @cached_property
    def panels(self) -> Panels:
        """The tiles for the native product."""
        return self._panels(self.weight.dtype)

    @cached_property
    def wide_panels(self) -> Panels:
        """The same in fp32."""
        return self._panels(torch.float32)

    def _panels(self, dtype: torch.dtype) -> Panels:
        return tile_panels(
            [(t.inputs, t.outputs, t.weight.to(dtype), t.bias) for t in self.tiles],
            inputs=self.layer.in_features,
            outputs=self.layer.out_features,
            block=self.layer.block,
        )

    @cached_property
    def entries(self) -> Panels:
        """The weights that are not 0, for the native product."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the layout is in beta
            return entry_panels(self.layer.dense_weight().to_sparse_csr(), self.bias)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The tiles in batches of about equal sizes."""
        return [self._bucket(tiles) for tiles in _alike(self.tiles)]

    @cached_property
    def bucket_outputs(self) -> torch.Tensor:
        """The outputs in the buckets' order."""
        return torch.cat([bucket.outputs for bucket in self.buckets])

    def _bucket(self, tiles: list[Tile]) -> Bucket:
        count, columns, block = len(tiles), len(tiles[0].weight), self.layer.block
        rows = max(tile.weight.shape[1] for tile in tiles)
        inputs = self.layer.inputs.new_zeros(count, rows // block)
        weights = self.weight.new_zeros(count, columns, rows)
        for number, tile in enumerate(tiles):
            inputs[number, : len(tile.inputs)] = tile.inputs
            weights[number, :, : tile.weight.shape[1]] = tile.weight
        outputs = torch.cat([tile.outputs for tile in tiles])
        biases = torch.stack([tile.bias for tile in tiles])
        return Bucket(inputs=inputs.flatten(), weights=weights, biases=biases, outputs=outputs)

    def forget(self) -> None:
        """Lets go of the layouts that were made to be measured; the one that is chosen is made again."""
        for layout in ("dense", "panels", "wide_panels", "entries", "buckets", "bucket_outputs"):
            self.__dict__.pop(layout, None)

    def compact(self, out_NM: torch.Tensor) -> torch.Tensor:
        """Where the tiles write: `out_NM` itself, if its order is theirs."""
        return out_NM if self.in_order else WORKSPACE.get("compact", (len(self.outputs), out_NM.shape[1]), out_NM)

    def spread(self, compact_CM: torch.Tensor, out_NM: torch.Tensor) -> None:
        """From the tiles' order to the outputs', those of no tile filled with their bias."""
        if not self.in_order:
            out_NM.index_copy_(0, self.outputs, compact_CM)
            self.fill_bare(out_NM)

    def fill_bare(self, out_NM: torch.Tensor) -> None:
        """Outputs of no tile are their bias."""
        if len(self.bare):
            out_NM.index_copy_(0, self.bare, self.bare_bias.expand(-1, out_NM.shape[1]))


def _alike(tiles: list[Tile]) -> list[list[Tile]]:
    """The tiles in groups that padding makes equal without growing a tile by more than MOST_PADDING."""
    rows = [tile.weight.shape[1] for tile in tiles]
    if len({len(tile.weight) for tile in tiles}) == 1 and max(rows) * len(rows) <= MOST_PADDING * sum(rows):
        return [tiles]
    groups: list[list[Tile]] = []
    for tile in sorted(tiles, key=lambda t: t.weight.shape, reverse=True):
        columns, inputs = tile.weight.shape
        if groups:
            most = groups[-1][0].weight.shape
            if most[0] == columns and most[1] <= MOST_PADDING * inputs:
                groups[-1].append(tile)
                continue
        groups.append([tile])
    return groups
