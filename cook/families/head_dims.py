"""The dimensions of the heads of a model: one group for the whole model.

Unit u is the same dimensions of every head in every layer: of queries and keys, which make the score, and of values and
the output projection's inputs. A stock class has one size for all four, so they go together. Under rotary positions a
unit is a pair of dimensions that are turned together, and where a part of the head is not turned, two of the others.
Without rotary positions a unit is one dimension. Where keys and values come from a latent, as in DeepSeek-V3, all heads
share the keys that are turned, which stay: a unit is a dimension of the other part of queries and keys, and of values.

Scores are divided by √head_dim: queries, or the weights of the norm behind them, are multiplied by √(new/old).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from cook.families.layout import Family
from cook.families.rotary import Turned, turned_dims
from cook.pruning.units import GatePoint, UnitGroup, WeightSlice

if TYPE_CHECKING:
    from cook.families.stock_space import Heads

NORMS = {"q": ("q_norm", "q_layernorm", "query_layernorm"), "k": ("k_norm", "k_layernorm", "key_layernorm")}
"""What classes call norms of queries and of keys, beside their projections."""
Units = tuple[tuple[int, ...], ...]
"""The dimensions of each unit in one head."""


def units_of_head(head_dim: int, turned: Turned) -> Units | None:
    """The units of a head, those that rotary positions turn first; None if an odd number is not turned."""
    number, neighbours = turned
    if not number:
        return tuple((index,) for index in range(head_dim))
    half, rest = number // 2, (head_dim - number) // 2
    pairs = [(2 * index, 2 * index + 1) if neighbours else (index, index + half) for index in range(half)]
    others = [(number + index, number + index + rest) for index in range(rest)]
    return (*pairs, *others) if head_dim % 2 == 0 else None


def turned_of(family: Family, config: PreTrainedConfig, model: torch.nn.Module) -> Turned | None:
    """What rotary positions turn of the dimensions that can go; None if these stay for the sake of the positions."""
    table = family.attention
    if table.latent:  # all heads share the part that is turned
        return Turned(0)
    if table.from_table:
        number = family.of_layers(model, table.turned)
        return None if number is None else Turned(number, neighbours=True)
    return turned_dims(family.own_config(config), family.own_part(model))


@dataclass(kw_only=True)
class HeadDims:
    """The group of head dimensions in the making."""

    units: Units
    slices: list[WeightSlice] = field(default_factory=list)
    gates: list[GatePoint] = field(default_factory=list)

    def add(self, path: str, dim: int, heads: int, *, offset: int = 0, period: int = 0, **more: Any) -> WeightSlice:
        """Adds the units of consecutive heads in a weight, each head after `period` indices (None: head_dim)."""
        size = len(self.units[0])
        period = period or len(self.units) * size
        piece = WeightSlice(
            path=path, dim=dim, block=size, offset=offset, within=self.units, period=period, repeats=heads, **more
        )
        self.slices.append(piece)
        return piece

    def gate(
        self, module: str, at: Literal["input", "output", "statistics"], features: int, *pieces: WeightSlice
    ) -> None:
        """Adds a gate where the units of `pieces` are among this number of features."""
        gate_of = [-1] * features
        for piece, unit in product(pieces, range(len(self.units))):
            for index in piece.indices([unit]).tolist():
                gate_of[index] = unit
        self.gates.append(GatePoint(module=module, at=at, features=tuple(gate_of)))

    def group(self) -> UnitGroup:
        return UnitGroup(
            kind="head_dims",
            site="att",
            layer=-1,
            size=len(self.units),
            members=len(self.units[0]),
            slices=tuple(self.slices),
            gate=self.gates[0],
            more_gates=tuple(self.gates[1:]),
        )


def head_dims(
    family: Family,
    config: PreTrainedConfig,
    model: torch.nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    heads: Mapping[str, Heads],
) -> UnitGroup | None:
    """The group of a stock model's head dimensions; None if its attention has no place in these rules.

    Args:
        family: The family's table.
        config: The model's config.
        model: The model, without weights.
        shapes: The shapes of its weights.
        heads: The heads of each layer that has attention, by the layer's path.
    """
    if not family.attention.head_dim:
        return None
    turned = turned_of(family, config, model)
    sizes = {own.head_dim for own in heads.values()}
    units = units_of_head(max(sizes), turned) if len(sizes) == 1 and turned is not None else None
    if units is None:
        return None
    made = HeadDims(units=units)
    add = _add_latent_layer if family.attention.latent else _add_layer
    if all(add(made, family, model, shapes, layer, own) for layer, own in heads.items()):
        return made.group()
    return None


def _add_layer(
    made: HeadDims,
    family: Family,
    model: torch.nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    layer: str,
    own: Heads,
) -> bool:
    """Adds the attention block of a layer; False if it has a weight that is not known here, or lacks the attributes."""
    table, dim = family.attention, own.head_dim
    module = model.get_submodule(layer)
    if _number(module, table.head_dim) != dim:
        return False
    if table.scaling and not _number(module, table.scaling):
        return False
    paths = {"q": f"{layer}.{table.q}", "k": f"{layer}.{table.k}", "v": f"{layer}.{table.v}"}
    counts = {"q": own.heads, "k": own.kv_heads, "v": own.kv_heads}
    norms = [
        (kind, norm) for kind, names in NORMS.items() for norm in _norms(shapes, paths[kind].rpartition(".")[0], names)
    ]
    inside = tuple(f"{layer}.{name}." for name in table.modules)
    positions = {
        name: f"{layer}.{path}" for name, path in table.positions.items() if f"{layer}.{path}.weight" in shapes
    }
    used = (*paths.values(), *positions.values(), f"{layer}.{table.out}")
    products = {f"{path}.{end}" for path in used for end in ("weight", "bias")}
    known = products | {f"{norm}.{end}" for _, norm in norms for end in ("weight", "bias")}
    known |= {f"{layer}.{name}" for name in table.per_head}
    others = {path for path in shapes if path.startswith(inside)} - known
    # Over each head, with weights for all of them or for every one, or over all heads.
    sizes = {kind: ((dim,), (counts[kind], dim), (counts[kind] * dim,)) for kind in NORMS}
    if others or any(shapes[f"{norm}.weight"] not in sizes[kind] for kind, norm in norms):
        return False
    end, folded = 0, 0.5 if table.scaling and not table.clipped else 0.0
    for name, path in paths.items():
        out_dim = 1 if isinstance(model.get_submodule(path), Conv1D) else 0
        power = folded if name == "q" and not norms else 0.0
        # In an interleaved weight every key-value head has its queries, its key and its value together.
        times = own.queries if table.interleaved and name == "q" else 1
        pieces = []
        for offset in range(end, end + times * dim, dim):
            place = {"offset": offset, "period": (own.queries + 2) * dim if table.interleaved else dim}
            pieces.append(_with_bias(made, shapes, path, out_dim, counts[name] // times, **place, power=power))
        if name == "q" or (name == "k" and norms):
            features = shapes[f"{path}.weight"][out_dim]
            # Attention sees equally many query heads of every key-value head; a norm with their weights does not.
            if own.per_key and name == "q" and f"{layer}.{table.q_norm}.weight" not in shapes:
                wide = own.kv_heads * own.queries
                features += (wide - own.heads) * dim
                pieces = [WeightSlice(**vars(piece) | {"repeats": wide}) for piece in pieces]
            made.gate(path, "output", features, *pieces)
        if table.q == table.k:
            end += times * dim if table.interleaved else counts[name] * dim
    for kind, path in positions.items():
        piece = _with_bias(made, shapes, path, 0, own.heads, power=folded if kind == "q" else 0.0)
        if kind == "q":
            made.gate(path, "output", own.heads * dim, piece)
    for name, path in norms:
        *before, features = shapes[f"{path}.weight"]
        power = folded if name == "q" else 0.0
        piece = _with_bias(made, shapes, path, len(before), features // dim, power=power)
        made.gate(path, "statistics", features, piece)
    out = f"{layer}.{table.out}"
    in_dim = 0 if isinstance(model.get_submodule(out), Conv1D) else 1
    piece = made.add(f"{out}.weight", in_dim, own.heads)
    made.gate(out, "input", shapes[piece.path][in_dim], piece)
    return True


def _with_bias(
    made: HeadDims, shapes: Mapping[str, tuple[int, ...]], path: str, dim: int, heads: int, **more: Any
) -> WeightSlice:
    """Adds the units in the weight of a module, and in its bias if it has one; returns the weight's slice."""
    piece, bias = made.add(f"{path}.weight", dim, heads, **more), f"{path}.bias"
    if bias in shapes:
        made.add(bias, len(shapes[bias]) - 1, heads, **more)
    return piece


def _norms(shapes: Mapping[str, tuple[int, ...]], block: str, names: Sequence[str]) -> list[str]:
    """The norm of a block that has one of these names, or StableLM's list of norms, one per head."""
    found = [f"{block}.{name}" for name in names if f"{block}.{name}.weight" in shapes]
    lists = tuple(f"{block}.{name}.norms." for name in names)
    return found or [
        path.removesuffix(".weight") for path in shapes if path.startswith(lists) and path.endswith("weight")
    ]


def _add_latent_layer(
    made: HeadDims,
    family: Family,
    model: torch.nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    layer: str,
    own: Heads,
) -> bool:
    """Adds an attention block whose keys and values come from a latent; False if keys have another size than values."""
    table, dim = family.attention, own.head_dim
    q, keys, out = f"{layer}.{table.q}", f"{layer}.{table.k}.weight", f"{layer}.{table.out}"
    rows = shapes[f"{q}.weight"][0]
    period = rows // own.heads
    if shapes[keys][0] != own.heads * 2 * dim or not _number(model.get_submodule(layer), table.scaling):
        return False
    query = made.add(f"{q}.weight", 0, own.heads, period=period, power=0.5, beside=period - dim)
    made.add(keys, 0, own.heads, period=2 * dim)
    made.add(keys, 0, own.heads, offset=dim, period=2 * dim)
    made.gate(q, "output", rows, query)
    values = made.add(f"{out}.weight", 1, own.heads)
    made.gate(out, "input", own.heads * dim, values)
    return True


def _number(layer: torch.nn.Module, path: str) -> float:
    """An attribute of a module in the layer, 0 if there is none."""
    block, _, name = path.rpartition(".")
    modules = dict(layer.named_modules())
    return float(getattr(modules.get(block), name, 0))
