"""The ways of computing a pruned layer's product, and which one is taken: the fastest, by measurement.

An export carries this file along. Activations stand transposed, `[features, rows]`: gathering inputs is then copying
whole contiguous lines. K inputs, N outputs, M rows (tokens).
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .sparse_memory import WORKSPACE
from .sparse_native import has_native, multiply
from .sparse_plan import Plan
from .sparse_triton import has_triton, tile_products

MOST_ENTRIES = 0.6
"""Share of weights over which a product with single weights has never won."""
LEAST_GAIN = 0.95
"""Share of the dense product's time that a way has to stay under; else the product is dense."""
COLUMNS_AT_ONCE = 256
"""Rows of activations that stay in a core's cache together with the gathered ones."""

Way = Callable[[Plan, torch.Tensor, torch.Tensor], None]
"""Writes the product of a plan and `[K, M]` into `[N, M]`."""


def ways(plan: Plan, x_KM: torch.Tensor) -> dict[str, Way]:
    """The ways that are open for these activations, the dense one first."""
    found: dict[str, Way] = {"dense": _dense}
    if not plan.tiles:
        return found
    found["batch"] = _batch
    if x_KM.is_cuda:
        if has_triton():
            found["triton"] = _triton
        return found
    found["loop"] = _loop
    if x_KM.shape[1] > COLUMNS_AT_ONCE:
        found["loop in parts"] = _loop_in_parts
    if x_KM.dtype == plan.weight.dtype and has_native(x_KM) and has_native(plan.weight):
        found["native"] = _native
        if len(plan.tiles) == 1 and plan.share < MOST_ENTRIES and x_KM.dtype == torch.float32:
            found["entries"] = _entries
    elif x_KM.dtype == plan.weight.dtype == torch.bfloat16 and has_native(x_KM.new_empty(0, dtype=torch.float32)):
        found["native in fp32"] = _native_in_fp32
    return found


def run(plan: Plan, x: torch.Tensor, *, transposed: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """The product for `[K, M]` (`transposed`) or `[M, K]`, by the way that was measured to be the fastest."""
    if torch.is_autocast_enabled(x.device.type):  # some ways obey it and others do not
        with torch.autocast(x.device.type, enabled=False):
            return run(plan, x, transposed=transposed, out=out)
    rows = x.shape[1] if transposed else x.shape[0]
    key = (_bucket(rows), transposed, x.dtype, x.device, type(x), torch.get_num_threads())
    way = plan.chosen.get(key)
    if way is None:
        way = plan.chosen[key] = choose(plan, x, transposed=transposed)
    return by(way, plan, x, transposed=transposed, out=out)


def by(way: Way, plan: Plan, x: torch.Tensor, *, transposed: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """The product in one of the `ways`."""
    if transposed:
        if out is None:
            out = torch.empty(plan.layer.out_features, x.shape[1], dtype=x.dtype, device=x.device)
        way(plan, x, out)
        return out
    if way is _dense:
        return F.linear(x, plan.dense, plan.bias)
    x_KM = WORKSPACE.get("turned", (x.shape[1], x.shape[0]), x).copy_(x.T)
    y_NM = WORKSPACE.get("product", (plan.layer.out_features, x.shape[0]), x)
    way(plan, x_KM, y_NM)
    return y_NM.T.contiguous()


def _dense(plan: Plan, x_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    torch.addmm(plan.bias[:, None], plan.dense, x_KM, out=out_NM)


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
    tile_products(x_KM, plan.weight, plan.bias[plan.outputs], layer.input_indices(), layer.sizes, out=compact)
    plan.spread(compact, out_NM)


def _native(plan: Plan, x_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    multiply(plan.panels, _in_lines(x_KM), out_NM)
    plan.fill_bare(out_NM)


def _native_in_fp32(plan: Plan, x_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    """For bf16 on a processor that does not multiply it: its products are much slower than those in fp32."""
    wide = WORKSPACE.get("wide", x_KM.shape, plan.wide_panels.biases).copy_(x_KM)
    product = WORKSPACE.get("wide product", out_NM.shape, wide)
    multiply(plan.wide_panels, wide, product)
    out_NM.copy_(product)
    plan.fill_bare(out_NM)


def _entries(plan: Plan, x_KM: torch.Tensor, out_NM: torch.Tensor) -> None:
    multiply(plan.entries, _in_lines(x_KM), out_NM)


def _in_lines(x_KM: torch.Tensor) -> torch.Tensor:
    return x_KM if x_KM.stride(1) == 1 or x_KM.shape[1] == 1 else x_KM.contiguous()


def _bucket(rows: int) -> int:
    """Numbers of rows that share a choice: the next power of two."""
    return 1 << max(0, rows - 1).bit_length()


_CHOICES: dict[tuple, str] = {}
_CHOOSING = threading.Lock()


def choose(plan: Plan, x: torch.Tensor, *, transposed: bool, repeats: int = 8) -> Way:
    """The fastest way for activations like `x`, measured once for all layers of about the same sizes."""
    layer, found = plan.layer, ways(plan, x if transposed else x.T)
    if len(found) == 1 or x.numel() == 0:
        return _dense
    signature = (type(layer), layer.in_features, layer.out_features, layer.block, len(plan.tiles))
    share = round(20 * plan.share), round(20 * layer.weight.numel() / (layer.in_features * layer.out_features))
    rows = _bucket(x.shape[1] if transposed else x.shape[0])
    key = (*signature, *share, tuple(found), rows, transposed, x.dtype, x.device, torch.get_num_threads())
    with _CHOOSING:
        if key not in _CHOICES:
            _CHOICES[key] = _fastest(_seconds(plan, found, x, transposed, repeats))
            plan.forget()
    return found[_CHOICES[key]]


def _fastest(seconds: dict[str, list[float]]) -> str:
    """The way with the least time, if it wins surely: else "dense".

    On a busy machine any single time may be wrong. A way has to win by its least time, in which the machine did the
    least else, and in most rounds, in each of which the machine was about as busy for all ways.
    """
    best = min(seconds, key=lambda name: min(seconds[name]))
    rounds = [own / dense for own, dense in zip(seconds[best], seconds["dense"], strict=True)]
    share = max(min(seconds[best]) / min(seconds["dense"]), statistics.median(rounds))
    return best if share < LEAST_GAIN else "dense"


def _seconds(
    plan: Plan, found: dict[str, Way], x: torch.Tensor, transposed: bool, repeats: int
) -> dict[str, list[float]]:
    """The times of each way, round by round; each round starts with another way, as it has to load what all read."""
    taken: dict[str, list[float]] = {name: [] for name in found}
    names = list(found)
    for turn in range(repeats + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _wait_for(x)
            start = time.perf_counter()
            by(found[name], plan, x, transposed=transposed)
            _wait_for(x)
            if turn:  # the first one warms up
                taken[name].append(time.perf_counter() - start)
    return taken


def _wait_for(x: torch.Tensor) -> None:
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)
