"""The experts of a stock model's FFN block, and the dimensions inside them, as units.

transformers fuses the experts of a block: `gate_up_proj` `[experts, 2 · dims, hidden]` and `down_proj`
`[experts, hidden, dims]`; in GPT-OSS `[experts, hidden, 2 · dims]` and `[experts, dims, hidden]`, with biases.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cook.families.layout import Experts
from cook.pruning.units import GatePoint, UnitGroup, WeightSlice

MULTIPLE = 8
"""Grouped products need rows of fused weights that fill 16 bytes: 8 numbers in half precision."""


def expert_groups(
    table: Experts, model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]], number: int, layer: str
) -> list[UnitGroup]:
    """The experts of a layer, and their dimensions; every expert keeps the same number of dimensions of its own.

    Args:
        table: The names of the block's parts.
        model: The model, without weights.
        shapes: The shapes of its weights.
        number: The number of the layer.
        layer: The layer's path.
    """
    router, inside = f"{layer}.{table.router}", f"{layer}.{table.module}"
    chosen = int(model.get_submodule(router).top_k)  # type: ignore[arg-type]
    count, dims = shapes[f"{inside}.down_proj"][0], shapes[f"{inside}.down_proj"][_inner(table)]
    sections, least = 1, chosen
    if table.scores == "sigmoid":
        # Groups are compared by their two best experts, and the experts of a token are in some groups only.
        sections = int(model.get_submodule(router).num_group)  # type: ignore[arg-type]
        least = max(2, -(-chosen // int(model.get_submodule(router).topk_group)))  # type: ignore[arg-type]
    owned = [path for path in shapes if path.startswith((f"{router}.", f"{inside}."))]
    experts = UnitGroup(
        kind="experts",
        site="ffn",
        layer=number,
        size=count,
        sections=sections,
        least=least,
        active=chosen,
        slices=tuple(WeightSlice(path=path, dim=0, block=1) for path in owned),
        gate=GatePoint(module=router, at=table.scores, repeat=1),
    )
    inner = UnitGroup(
        kind="dimff",
        site="ffn",
        layer=number,
        size=count * dims,
        sections=count,
        least=1,
        multiple=MULTIPLE if dims % MULTIPLE == 0 else 1,
        active=chosen,
        slices=tuple(_inner_slices(table, inside, shapes, dims)),
        gate=GatePoint(module=inside, at="weight", repeat=1, weight="down_proj", dim=_inner(table)),
    )
    return [experts, inner]


def expert_sizes(table: Experts, shapes: Mapping[str, tuple[int, ...]], layer: str) -> tuple[int, int] | None:
    """Experts of a layer and dimensions of each; None if the layer has no experts."""
    shape = shapes.get(f"{layer}.{table.module}.down_proj")
    return None if shape is None else (shape[0], shape[_inner(table)])


def stream_dims(table: Experts, name: str) -> tuple[int | None, int | None]:
    """The dimensions of a weight that read the residual stream and that write it; `name` is relative to the layer."""
    if name == f"{table.router}.weight":
        return 1, None
    if name == f"{table.module}.gate_up_proj":
        return (1 if table.transposed else 2), None
    if name == f"{table.module}.down_proj":
        return None, 2 if table.transposed else 1
    if name == f"{table.module}.down_proj_bias":
        return None, 1
    return None, None


def _inner(table: Experts) -> int:
    """The dimension of `down_proj` that has the dimensions of an expert."""
    return 1 if table.transposed else 2


def _inner_slices(table: Experts, inside: str, shapes: Mapping[str, tuple[int, ...]], dims: int) -> list[WeightSlice]:
    if table.transposed:  # gate and up alternate
        ins = [WeightSlice(path=f"{inside}.gate_up_proj", dim=2, block=2, row_units=dims)]
        if f"{inside}.gate_up_proj_bias" in shapes:
            ins.append(WeightSlice(path=f"{inside}.gate_up_proj_bias", dim=1, block=2, row_units=dims))
    else:
        ins = [
            WeightSlice(path=f"{inside}.gate_up_proj", dim=1, block=1, offset=offset, row_units=dims)
            for offset in (0, dims)
        ]
    return [*ins, WeightSlice(path=f"{inside}.down_proj", dim=_inner(table), block=1, row_units=dims)]
