"""The changes to a stock model by `cook.models.ragged` that give a reshaped one, where no stock config does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from cook.families.experts import expert_sizes
from cook.families.layout import Attention, Family, FeedForward
from cook.families.stock_models import config_object, skeleton, weight_shapes
from cook.families.stock_space import Heads, head_dim_of, heads_of
from cook.pruning.family import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]


def structure_of(
    family: Family,
    base: ModelConfig,
    shapes: Shapes,
    heads: list[Heads | None],
    hidden: int,
    norms: Collection[str],
    pairs: Sequence[int],
    factor: float | None,
) -> dict[str, Any]:
    """The changes by `cook.models.ragged` to the stock model of `base` that give weights of these shapes.

    Args:
        family: The family's table.
        base: The stock config.
        shapes: The shapes of the weights.
        heads: The heads of each layer.
        hidden: The hidden size.
        norms: The paths of the norms on the stream, some of which may have no weights that state their size.
        pairs: The pairs of a head that rotary positions turn, by number in the stock model's table if it has one.
        factor: The factor of scores, if it stays although heads have another size.
    """
    model = skeleton(family, base)
    stock = weight_shapes(model)
    structure: dict[str, Any] = {"attributes": {}, "absent": {}, "constant": {}, "identity": [], "uneven_keys": False}
    structure |= {"spread": {}, "gathered": {}, "slopes": {}, "pairs": {}}
    structure["rebuilt"] = _rebuilt(family, shapes, stock, heads, hidden)
    made_anew = tuple(f"{path}." for path in structure["rebuilt"])
    structure["shapes"] = {
        path: list(shape) for path, shape in shapes.items() if shape != stock[path] and not path.startswith(made_anew)
    }
    dim = head_dim_of(family, config_object(base))
    has_other_factor = factor not in (None, family.of_layers(model, family.attention.scaling))
    for number, own in enumerate(heads):
        layer = f"{family.layers}.{number}"
        before = heads_of(family, dim, model, layer)
        if own is not None and before is not None and (own != before or has_other_factor):
            structure["uneven_keys"] |= own.kv_heads != before.kv_heads
            if own.per_key:
                _lay_out(family.attention, layer, own, structure, shapes)
            if own.slopes:
                block = f"{layer}.{next(iter(family.attention.modules))}"
                structure["slopes"][block] = {"of": before.heads, "heads": list(own.slopes)}
            values: dict[str, float] = {name: own.sizes[size] for name, size in family.attention.remembers.items()}
            if own.head_dim != before.head_dim:
                values |= _of_head_dim(family.attention, model.get_submodule(layer), before.head_dim, own.head_dim)
                values |= {family.attention.turned: 2 * len(pairs)} if family.attention.turned else {}
                if family.attention.from_table:
                    structure["pairs"][f"{layer}.{next(iter(family.attention.modules))}"] = [*pairs]
            values |= {family.attention.scaling: factor} if factor is not None else {}
            for attribute, value in values.items():
                # A config's field is an attribute `config.name` of the module.
                module, dot, field = f"{layer}.{attribute}".partition(".config.")
                path, _, name = (module, dot, f"config.{field}") if dot else module.rpartition(".")
                structure["attributes"].setdefault(path, {})[name] = value
        if f"{layer}.{family.attention.out}.weight" not in shapes:
            _take_out(family.attention, layer, shapes, structure)
        is_mixed = family.experts is not None and expert_sizes(family.experts, shapes, layer) is not None
        if f"{layer}.{family.ffn.out}.weight" not in shapes and not is_mixed:
            _take_out(family.ffn, layer, shapes, structure)
        shared = [f"{layer}.{name}" for name in family.norms_shared]
        structure["identity"] += [n for n in shared if f"{n}.weight" in stock and f"{n}.weight" not in shapes]
    modules: dict[str, Any] = dict(model.named_modules())
    for path in {*norms}.intersection(modules).difference(structure["identity"]):
        if not [*modules[path].parameters()] and tuple(modules[path].normalized_shape) != (hidden,):
            structure["attributes"].setdefault(path, {})["normalized_shape"] = [hidden]
    return structure


def _of_head_dim(table: Attention, layer: torch.nn.Module, before: int, after: int) -> dict[str, float]:
    """The attributes of a layer's attention that follow from the size of a head."""
    values: dict[str, float] = {table.head_dim: after}
    if table.scaling not in ("", table.head_dim):
        path, _, name = table.scaling.rpartition(".")
        values[table.scaling] = getattr(layer.get_submodule(path), name) * (before / after) ** 0.5
    return values


def _rebuilt(
    family: Family, shapes: Shapes, stock: Shapes, heads: list[Heads | None], hidden: int
) -> dict[str, dict[str, int]]:
    """The modules that are built anew, since their weights have no module that could be exchanged; those that have
    other sizes than in the stock model, with their sizes by config fields.
    """
    table, names = family.experts, family.names
    candidates: dict[str, dict[str, int]] = {}
    for number, own in enumerate(heads):
        layer = f"{family.layers}.{number}"
        sizes = None if table is None else expert_sizes(table, shapes, layer)
        if table is not None and sizes is not None:
            fields = {table.count: sizes[0], table.dims: sizes[1]}
            candidates |= {f"{layer}.{name}": fields for name in (table.router, table.module)}
        if family.attention.per_head and own is not None and isinstance(names.kv_heads, str):
            fields = {names.heads: own.heads, names.kv_heads: own.kv_heads}
            candidates[f"{layer}.{next(iter(family.attention.modules))}"] = fields
    found = {}
    for path, fields in candidates.items():
        inside = [name for name in shapes if name.startswith(f"{path}.")]
        if any(shapes[name] != stock[name] for name in inside):
            found[path] = fields | {names.hidden: hidden}
    return found


def _lay_out(table: Attention, layer: str, heads: Heads, structure: dict[str, Any], shapes: Shapes) -> None:
    """Places for query heads between the projections: as many for every key-value head."""
    parts = [[number * heads.head_dim, heads.queries * heads.head_dim] for number in heads.per_key]
    rest = 2 * heads.kv_heads * heads.head_dim
    last = table.q_norm if f"{layer}.{table.q_norm}.weight" in shapes else table.q
    structure["spread"][f"{layer}.{last}"] = parts + ([[rest, rest]] if table.q == table.k else [])
    structure["gathered"][f"{layer}.{table.out}"] = parts


def _take_out(table: Attention | FeedForward, layer: str, shapes: Shapes, structure: dict[str, Any]) -> None:
    bias = f"{layer}.{table.out}.bias"
    for name, kind in table.modules.items():
        path = f"{layer}.{name}"
        structure["absent"][path] = kind
        if bias in shapes and bias.startswith(f"{path}."):
            structure["constant"][path] = bias
    acts_on = [f"{layer}.{name}" for name in table.norms_after if f"{layer}.{name}.weight" in shapes]
    norms = [f"{layer}.{name}" for name in (*table.norms_before, *table.norms_after)]
    structure["identity"] += [path for path in norms if path not in acts_on]
