"""How a pruned layer's product is computed: its weights laid out for several ways, and the fastest one by measurement.

An export carries this file along; it needs PyTorch alone. Inputs are K, outputs N, rows (tokens) M. Inside, activations
stand transposed, `[features, rows]`: gathering inputs is then copying whole contiguous lines.

    K inputs, N outputs, M rows, T tiles, C columns (outputs) of a tile, R rows of W (inputs) that a tile reads
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .sparse_triton import has_triton, tile_products

MOST_ENTRIES = 0.35
"""Share of weights over which a product with single weights has never won."""
MOST_PADDING = 1.15
"""Tiles of unequal sizes are padded for one batched product up to this growth."""
COLUMNS_AT_ONCE = 256
"""Rows of activations that stay in a core's cache together with the gathered ones."""
LINES_AT_ONCE = 128
"""The same for products with single weights, which read the activations in no order."""


class Workspace(threading.local):
    """Memory that products write into and the next ones use again: each thread has its own."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def get(self, name: str, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor that the next call with this name takes back."""
        count = 1
        for size in shape:
            count *= size
        key = (name, like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[key] = torch.empty(count, dtype=like.dtype, device=like.device)
        return buffer[:count].view(*shape)


WORKSPACE = Workspace()


@dataclass(frozen=True)
class Tile:
    """A tile's views of its layer's tensors."""

    inputs: torch.Tensor
    """Which inputs it reads (which blocks of them, in a block-wise layer)."""
    weight: torch.Tensor
    """`[C, R]`"""
    bias: torch.Tensor
    """`[C, 1]`"""
    start: int
    """Of its outputs in the compact order, tile after tile."""
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
    """A layer's weights laid out for its ways of computing, and the way chosen for each number of rows.

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
        self.chosen: dict[tuple, Way] = {}
        self._dense: torch.Tensor | None = None
        self._buckets: list[Bucket] | None = None
        self._bucket_outputs: torch.Tensor | None = None
        self._entries: torch.Tensor | None = None
        # A tile can be full of zeros where the mask is of single weights or vectors.
        self.share = int(self.weight.count_nonzero()) / max(1, layer.in_features * layer.out_features)

    def _tiles(self):
        at = row = column = 0
        block, inputs = self.layer.block, self.layer.inputs
        for rows, columns in self.layer.sizes:
            lines = self.outputs[column : column + columns]
            yield Tile(
                inputs=inputs[row // block : (row + rows) // block].contiguous(),
                weight=self.weight[at : at + rows * columns].view(columns, rows),
                bias=self.bias[lines, None],
                start=column,
                rows=rows,
            )
            at, row, column = at + rows * columns, row + rows, column + columns

    @property
    def dense(self) -> torch.Tensor:
        """`[N, K]`"""
        if self._dense is None:
            self._dense = self.layer.dense_weight()
        return self._dense

    @property
    def entries(self) -> torch.Tensor:
        """`[N, K]` as a list of the weights that are not 0, row by row."""
        if self._entries is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the layout is in beta
                found = self.layer.dense_weight().to_sparse_csr()
                # With 64 bits every product would turn the indices into 32 first.
                places = (found.crow_indices().int(), found.col_indices().int())
                self._entries = torch.sparse_csr_tensor(*places, found.values(), found.shape)
        return self._entries

    @property
    def buckets(self) -> list[Bucket]:
        """The tiles in batches of about equal sizes."""
        if self._buckets is None:
            self._buckets = [self._bucket(tiles) for tiles in _alike(self.tiles)]
        return self._buckets

    @property
    def bucket_outputs(self) -> torch.Tensor:
        """The outputs in the buckets' order."""
        if self._bucket_outputs is None:
            self._bucket_outputs = torch.cat([bucket.outputs for bucket in self.buckets])
        return self._bucket_outputs

    def _bucket(self, tiles: list[Tile]) -> Bucket:
        count, columns, block = len(tiles), len(tiles[0].weight), self.layer.block
        rows = max(tile.weight.shape[1] for tile in tiles)
        inputs = self.layer.inputs.new_zeros(count, rows // block)
        weights = self.weight.new_zeros(count, columns, rows)
        for number, tile in enumerate(tiles):
            inputs[number, : len(tile.inputs)] = tile.inputs
            weights[number, :, : tile.weight.shape[1]] = tile.weight
        outputs = torch.cat([self.outputs[tile.start : tile.start + columns] for tile in tiles])
        biases = torch.stack([tile.bias for tile in tiles])
        return Bucket(inputs=inputs.flatten(), weights=weights, biases=biases, outputs=outputs)

    def forget(self) -> None:
        """Lets go of the layouts that were made to be measured; the one that is chosen is made again."""
        self._dense = self._buckets = self._bucket_outputs = self._entries = None

    def ways(self, x: torch.Tensor) -> dict[str, Way]:
        """The ways of computing that are open for these activations, the dense one first."""
        found: dict[str, Way] = {"dense": _dense}
        if not self.tiles:
            return found
        if len(self.tiles) == 1 and self.share < MOST_ENTRIES and _multiplies_entries(x):
            found["entries"] = _by_entries
        found["batch"] = _batch
        if x.is_cuda:
            if has_triton():
                found["triton"] = _triton
            return found
        found["loop"] = _loop
        if x.shape[1] > COLUMNS_AT_ONCE:
            found["loop in parts"] = _loop_in_parts
        return found

    def run(self, x: torch.Tensor, *, transposed: bool, out: torch.Tensor | None = None) -> torch.Tensor:
        """The product for `[K, M]` (`transposed`) or `[M, K]`, by the way that was measured to be the fastest."""
        rows = x.shape[1] if transposed else x.shape[0]
        key = (_bucket(rows), transposed, x.dtype, x.device)
        way = self.chosen.get(key)
        if way is None:
            way = self.chosen[key] = choose(self, x, transposed=transposed)
        return self.by(way, x, transposed=transposed, out=out)

    def by(
        self, way: Way, x: torch.Tensor, *, transposed: bool, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The product in one of the `ways`."""
        if transposed:
            if out is None:
                out = torch.empty(self.layer.out_features, x.shape[1], dtype=x.dtype, device=x.device)
            way(self, x, out)
            return out
        if way is _dense:
            return F.linear(x, self.dense, self.bias)
        x_KM = WORKSPACE.get("turned", (x.shape[1], x.shape[0]), x).copy_(x.T)
        y_NM = WORKSPACE.get("product", (self.layer.out_features, x.shape[0]), x)
        way(self, x_KM, y_NM)
        return y_NM.T.contiguous()

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


Way = Callable[[Plan, torch.Tensor, torch.Tensor], None]
"""Writes the product of a plan and `[K, M]` into `[N, M]`."""


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


def _dense(plan: Plan, x_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    torch.addmm(plan.bias[:, None], plan.dense, x_KM, out=out_NM)


def _multiplies_entries(x: torch.Tensor) -> bool:
    """Whether there is a product with single weights for activations like `x`."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkl.is_available()


def _by_entries(plan: Plan, x_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    bias = plan.bias[:, None]
    for start in range(0, x_KM.shape[1], LINES_AT_ONCE):
        part = slice(start, start + LINES_AT_ONCE)
        lines = x_KM[:, part].contiguous()
        out_NM[:, part].copy_(torch.addmm(bias.expand(-1, lines.shape[1]), plan.entries, lines))


def _gather(x_KM: torch.Tensor, inputs: torch.Tensor, block: int) -> torch.Tensor:
    columns = x_KM.shape[1]
    gathered = WORKSPACE.get("gathered", (len(inputs) * block, columns), x_KM)
    if block == 1:
        return torch.index_select(x_KM, 0, inputs, out=gathered)
    torch.index_select(x_KM.unflatten(0, (-1, block)), 0, inputs, out=gathered.view(-1, block, columns))
    return gathered


def _loop(plan: Plan, x_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    compact = plan.compact(out_NM)
    _tile_by_tile(plan, x_KM, compact)
    plan.spread(compact, out_NM)


def _loop_in_parts(plan: Plan, x_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    compact = plan.compact(out_NM)
    for start in range(0, x_KM.shape[1], COLUMNS_AT_ONCE):
        part = slice(start, start + COLUMNS_AT_ONCE)
        _tile_by_tile(plan, x_KM[:, part], compact[:, part])
    plan.spread(compact, out_NM)


def _tile_by_tile(plan: Plan, x_KM: torch.Tensor, compact_CM: torch.Tensor) -> None:
    block, columns = plan.layer.block, x_KM.shape[1]
    buffer = WORKSPACE.get("gathered", (plan.most_inputs, columns), x_KM)
    source = x_KM if block == 1 else x_KM.unflatten(0, (-1, block))
    # Views are made once for all tiles: making one costs as much as a gather.
    views = {rows: buffer[:rows] for rows in plan.input_counts}
    places = views if block == 1 else {rows: view.view(-1, block, columns) for rows, view in views.items()}
    for tile, out in zip(plan.tiles, compact_CM.split(plan.output_counts), strict=True):
        torch.index_select(source, 0, tile.inputs, out=places[tile.rows])
        torch.addmm(tile.bias, tile.weight, views[tile.rows], out=out)


def _batch(plan: Plan, x_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    buckets, rows = plan.buckets, x_KM.shape[1]
    straight = plan.in_order and len(buckets) == 1 and out_NM.is_contiguous()
    products = out_NM if straight else WORKSPACE.get("products", (len(plan.outputs), rows), x_KM)
    start = 0
    for bucket in buckets:
        count, columns, inputs = bucket.weights.shape
        gathered = _gather(x_KM, bucket.inputs, plan.layer.block).view(count, inputs, rows)
        part = products[start : start + count * columns].view(count, columns, rows)
        torch.baddbmm(bucket.biases, bucket.weights, gathered, out=part)
        start += count * columns
    if not straight:
        out_NM.index_copy_(0, plan.bucket_outputs, products)
        plan.fill_bare(out_NM)


def _triton(plan: Plan, x_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    compact = plan.compact(out_NM)
    layer = plan.layer
    tile_products(
        x_KM, plan.weight, plan.bias[plan.outputs], layer.input_indices(), layer.sizes, out=compact
    )
    plan.spread(compact, out_NM)


def _bucket(rows: int) -> int:
    """Numbers of rows that share a choice: the next power of two."""
    return 1 << max(0, rows - 1).bit_length()


_CHOICES: dict[tuple, str] = {}
_CHOOSING = threading.Lock()


def choose(plan: Plan, x: torch.Tensor, *, transposed: bool, repeats: int = 8) -> Way:
    """The fastest way for activations like `x`, measured once for all layers of about the same sizes.

    Sparse has to win by more than the measuring's noise: else it is the dense product.
    """
    layer, ways = plan.layer, plan.ways(x.T if not transposed else x)
    if len(ways) == 1 or x.numel() == 0:
        return _dense
    signature = (type(layer), layer.in_features, layer.out_features, layer.block, len(plan.tiles))
    share = round(20 * plan.share), round(20 * layer.weight.numel() / (layer.in_features * layer.out_features))
    rows = _bucket(x.shape[1] if transposed else x.shape[0])
    key = (*signature, *share, tuple(ways), rows, transposed, x.dtype, x.device, torch.get_num_threads())
    with _CHOOSING:
        if key not in _CHOICES:
            seconds = _seconds(plan, ways, x, transposed, repeats)
            best = min(seconds, key=lambda name: seconds[name])
            _CHOICES[key] = best if seconds[best] < 0.95 * seconds["dense"] else "dense"
            plan.forget()
    return ways[_CHOICES[key]]


def _seconds(
    plan: Plan, ways: dict[str, Way], x: torch.Tensor, transposed: bool, repeats: int
) -> dict[str, float]:
    """The least time of each way; they take turns, so that what else the machine does meets all of them."""
    least = dict.fromkeys(ways, float("inf"))
    for turn in range(repeats + 1):
        for name, way in ways.items():
            _wait_for(x)
            start = time.perf_counter()
            plan.by(way, x, transposed=transposed)
            _wait_for(x)
            if turn:  # the first one warms up
                least[name] = min(least[name], time.perf_counter() - start)
    return least


def _wait_for(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
