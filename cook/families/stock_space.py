"""The pruning space of a stock model, from its family's table and the shapes of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from cook.families.experts import expert_groups
from cook.families.head_dims import head_dims
from cook.families.layout import Attention, Family, FeedForward
from cook.families.stock_models import config_object, skeleton, weight_shapes
from cook.families.stream import hidden_dims
from cook.models import ragged
from cook.pruning.family import ModelConfig
from cook.pruning.units import GatePoint, HeadUnit, PruningSpace, Site, UnitGroup, WeightSlice


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of one attention block."""

    heads: int
    kv_heads: int
    head_dim: int
    per_key: tuple[int, ...] = ()
    """The query heads of each key-value head, if they differ; empty: equally many."""
    slopes: tuple[int, ...] = ()
    """The original numbers of the heads, if every head has a slope of its own and some are gone."""

    @property
    def queries(self) -> int:
        """Query heads of the key-value head that has the most."""
        return max(self.per_key, default=0) or self.heads // self.kv_heads

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers by the names in `Attention.remembers`, as the attention between the projections sees them."""
        heads = self.kv_heads * self.queries
        return {
            "heads": heads,
            "kv_heads": self.kv_heads,
            "heads_per_kv": self.queries,
            "width": heads * self.head_dim,
        }


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a weight: the offset and width of its units along the output."""

    path: str
    offset: int
    block: int


def head_dim_of(family: Family, config: PreTrainedConfig) -> int:
    """Features per head."""
    if getattr(config, "structure", None) and "head_dim" in config.structure:
        return int(config.structure["head_dim"])
    config = family.own_config(config)
    explicit = getattr(config, family.names.head_dim, None) if family.names.head_dim else None
    return int(explicit or getattr(config, family.names.hidden) // getattr(config, family.names.heads))


def heads_of(family: Family, head_dim: int, model: torch.nn.Module, layer: str) -> Heads | None:
    """The heads of a layer's attention block; None if there is no such block."""
    table = family.attention
    try:
        out, keys = model.get_submodule(f"{layer}.{table.out}"), model.get_submodule(f"{layer}.{table.k}")
        inner = out.get_parameter("weight").shape[_in_dim(out)]
    except AttributeError:
        return None
    if table.latent:
        return Heads(heads=inner // head_dim, kv_heads=inner // head_dim, head_dim=head_dim)
    width = keys.get_parameter("weight").shape[1 - _in_dim(keys)]
    if table.q == table.k == table.v:
        width = (width - inner) // 2
    laid_out = getattr(out, ragged.PARTS, None) or ()
    per_key = tuple(own // head_dim for own, _ in laid_out)
    slopes = getattr(model.get_submodule(f"{layer}.{next(iter(table.modules))}"), ragged.SLOPES, {"heads": ()})
    return Heads(
        heads=inner // head_dim,
        kv_heads=width // head_dim,
        head_dim=head_dim,
        per_key=per_key,
        slopes=tuple(slopes["heads"]),
    )


def head_units(family: Family, config: ModelConfig) -> tuple[HeadUnit, ...]:
    """Both kinds if key-value heads are shared; else every query head is its own group."""
    made = family.own_config(config_object(config))
    is_shared = family.names.key_value_heads(made) < getattr(made, family.names.heads)
    return ("kv_group", "query_head") if is_shared and can_share_keys(family) else ("kv_group",)


def can_share_keys(family: Family) -> bool:
    """Whether query heads of a shared key-value head can be units: if heads of one group go, places are left for them,
    which weights of single heads lack; and where q, k and v are interleaved, only whole groups are consecutive.
    """
    table = family.attention
    return family.names.kv_heads is not None and not (table.latent or table.per_head or table.interleaved)


def space(family: Family, config: ModelConfig, head_unit: HeadUnit = "kv_group") -> PruningSpace:
    """Everything that can be pruned in a model of this config."""
    model = skeleton(family, config)
    shapes, made = weight_shapes(model), config_object(config)
    num_layers = getattr(family.own_config(made), family.names.layers)
    groups: list[UnitGroup] = []
    heads: dict[str, Heads] = {}
    shared: dict[str, tuple[str, ...]] = {}
    for number in range(num_layers):
        layer = f"{family.layers}.{number}"
        own = _attention(family, head_dim_of(family, made), head_unit, model, shapes, number, layer)
        if found := heads_of(family, head_dim_of(family, made), model, layer):
            heads[layer] = found
        experts = family.experts
        if experts is not None and f"{layer}.{experts.router}.weight" in shapes:
            own.append(block_of(family.ffn, "ffn", shapes, number, layer, experts.block))
            own += expert_groups(experts, model, shapes, number, layer)
        else:
            own += _feed_forward(family, model, shapes, number, layer)
        blocks = tuple(group.name for group in own if group.kind == "layer")
        norms = tuple(f"{layer}.{name}." for name in family.norms_shared)
        shared |= {path: blocks for path in shapes if norms and blocks and path.startswith(norms)}
        groups += own
    if any(group.kind == "experts" for group in groups):
        # Mask files and configs have one number of dims per block: those of the experts.
        groups = [group for group in groups if group.kind != "dimff" or group.active]
    head = model.get_output_embeddings()  # type: ignore[operator]
    logits = next((path for path, weight in model.named_parameters() if head and weight is head.weight), "")
    return PruningSpace(
        num_layers=num_layers,
        shapes=shapes,
        groups=tuple(groups),
        logits_weight=logits,
        hidden=hidden_dims(family, made, model, shapes),
        head_dims=head_dims(family, made, model, shapes, heads),
        shared=shared,
    )


def _attention(
    family: Family,
    head_dim: int,
    head_unit: HeadUnit,
    model: torch.nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    number: int,
    layer: str,
) -> list[UnitGroup]:
    table, found = family.attention, heads_of(family, head_dim, model, layer)
    if found is None:
        return []
    queries = found.queries
    # A key-value group is no unit where groups differ in size.
    whole = not found.per_key and (head_unit == "kv_group" or queries == 1)
    width = queries * head_dim if whole else head_dim
    blocks = {"q": width, "k": head_dim, "v": head_dim} if whole else {"q": width}
    parts, keys = [], []
    if table.latent:
        parts = [
            Part(path=path, offset=0, block=shapes[f"{layer}.{path}.weight"][0] // found.heads)
            for path in dict.fromkeys((table.q, table.k, table.v))
        ]
    elif table.interleaved:
        parts = [Part(path=table.q, offset=0, block=(queries + 2) * head_dim)]
        assert whole, "query heads with shared keys cannot be separated in an interleaved weight"
    else:
        spans = {"q": found.heads * head_dim, "k": found.kv_heads * head_dim, "v": found.kv_heads * head_dim}
        paths = {"q": table.q, "k": table.k, "v": table.v}
        offsets = _offsets(list(paths.values()), list(spans.values()))
        parts = [
            Part(path=paths[name], offset=offset, block=blocks[name])
            for name, offset in zip(paths, offsets, strict=True)
            if name in blocks
        ]
        keys = [
            Part(path=paths[name], offset=offset, block=head_dim)
            for name, offset in zip(paths, offsets, strict=True)
            if name not in blocks
        ]
    has = [name for name in table.positions.values() if f"{layer}.{name}.weight" in shapes]
    parts += [Part(path=name, offset=0, block=width) for name in has]
    units: dict[str, Any] = {"size": found.kv_heads, "members": queries, "head_unit": "kv_group"}
    if not whole:
        units = {"size": found.heads, "sections": found.kv_heads, "head_unit": "query_head"}
        units["section_sizes"] = found.per_key
    of_queries = _norm_of_heads(shapes, layer, table.q_norm, table.q, width, head_dim)
    of_keys = _norm_of_heads(shapes, layer, table.k_norm, table.k, head_dim, head_dim)
    own = (of_queries, of_keys) if whole else (of_queries,)
    units["more_gates"] = tuple(gate for _, gates in own for gate in gates)
    if table.latent:
        read = model.get_submodule(f"{layer}.{table.reads[-1]}").get_parameter("weight")
        units["cache"] = read.shape[0]
    slices = (
        *_in_slices(model, shapes, layer, parts),
        *(piece for pieces, _ in own for piece in pieces),
        *(WeightSlice(path=f"{layer}.{name}", dim=0, block=width // head_dim) for name in table.per_head),
        _out_slice(model, f"{layer}.{table.out}", width),
    )
    made = block_and_units(table, "att", shapes, number, layer, slices, width, units)
    if family.heads_stay:
        return made[:1]
    if not whole:
        repeat = tuple(n * head_dim for n in found.per_key) or queries * head_dim
        made.append(
            UnitGroup(
                kind="keys",
                site="att",
                layer=number,
                size=found.kv_heads,
                slices=(*_in_slices(model, shapes, layer, keys), *of_keys[0]),
                gate=GatePoint(module=f"{layer}.{table.out}", at="input", repeat=repeat),
                more_gates=of_keys[1],
            )
        )
    return made


def _norm_of_heads(
    shapes: Mapping[str, tuple[int, ...]], layer: str, norm: str, product: str, width: int, head_dim: int
) -> tuple[tuple[WeightSlice, ...], tuple[GatePoint, ...]]:
    """The slices and gates of a norm with weights of its own for every head; `width`: features of `product`, the norm's
    input, per unit.
    """
    path = f"{layer}.{norm}.weight"
    if not norm or path not in shapes:
        return (), ()
    if len(shapes[path]) == 2:  # over every head alone
        return (WeightSlice(path=path, dim=0, block=width // head_dim),), ()
    # Over all heads: those that are gone must not count, so they are zero before the norm.
    gates = (
        GatePoint(module=f"{layer}.{product}", at="output", repeat=width),
        GatePoint(module=f"{layer}.{norm}", at="statistics", repeat=width),
    )
    return (WeightSlice(path=path, dim=0, block=width),), gates


def _feed_forward(
    family: Family, model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]], number: int, layer: str
) -> list[UnitGroup]:
    table = family.ffn
    path = f"{layer}.{table.out}.weight"
    if path not in shapes:
        return []
    out = _out_slice(model, f"{layer}.{table.out}", 1)
    size = shapes[path][out.dim]
    offsets = _offsets(list(table.ins), [size] * len(table.ins))
    parts = [Part(path=name, offset=offset, block=1) for name, offset in zip(table.ins, offsets, strict=True)]
    slices = (*_in_slices(model, shapes, layer, parts), out)
    return block_and_units(table, "ffn", shapes, number, layer, slices, 1, {"size": size})


def _offsets(paths: Sequence[str], spans: Sequence[int]) -> list[int]:
    """The offset of each part in its weight; parts of one path are consecutive."""
    ends: dict[str, int] = {}
    begins = []
    for path, span in zip(paths, spans, strict=True):
        begins.append(ends.get(path, 0))
        ends[path] = begins[-1] + span
    return begins


def _in_dim(module: torch.nn.Module) -> int:
    return 0 if isinstance(module, Conv1D) else 1


def _in_slices(
    model: torch.nn.Module, shapes: Mapping[str, Any], layer: str, parts: Sequence[Part]
) -> Iterator[WeightSlice]:
    for part in parts:
        path = f"{layer}.{part.path}"
        dim = 1 - _in_dim(model.get_submodule(path))
        yield WeightSlice(path=f"{path}.weight", dim=dim, block=part.block, offset=part.offset)
        if f"{path}.bias" in shapes:
            yield WeightSlice(path=f"{path}.bias", dim=0, block=part.block, offset=part.offset)


def _out_slice(model: torch.nn.Module, path: str, width: int) -> WeightSlice:
    return WeightSlice(path=f"{path}.weight", dim=_in_dim(model.get_submodule(path)), block=width)


def block_and_units(
    table: Attention | FeedForward,
    site: Site,
    shapes: Mapping[str, tuple[int, ...]],
    number: int,
    layer: str,
    slices: tuple[WeightSlice, ...],
    width: int,
    units: Mapping[str, Any],
) -> list[UnitGroup]:
    """A block as one unit, and its heads or dims with `slices`; `width`: inputs of `table.out` per unit."""
    gate = GatePoint(module=f"{layer}.{table.out}", at="input", repeat=width)
    kind = "heads" if site == "att" else "dimff"
    inner = UnitGroup(kind=kind, site=site, layer=number, slices=slices, gate=gate, **units)  # type: ignore[arg-type]
    return [block_of(table, site, shapes, number, layer, table.out), inner]


def block_of(
    table: Attention | FeedForward,
    site: Site,
    shapes: Mapping[str, tuple[int, ...]],
    number: int,
    layer: str,
    last: str,
) -> UnitGroup:
    """A block as one unit; `last`: the module whose output is the block's, but for the norms after it."""
    inside = tuple(f"{layer}.{name}." for name in (*table.modules, *table.norms_before, *table.norms_after))
    after = [path for path in shapes if path.startswith(tuple(f"{layer}.{name}." for name in table.norms_after))]
    out, end = f"{layer}.{last}", f"{layer}.{(last, *table.norms_after)[-1]}"
    # A norm after the block maps zero to its bias, which then still acts.
    acts_on = f"{out}.bias" in shapes or f"{end}.bias" in shapes
    return UnitGroup(
        kind="layer",
        site=site,
        layer=number,
        size=1,
        slices=tuple(WeightSlice(path=p, dim=0, block=(shapes[p] or (1,))[0]) for p in shapes if p.startswith(inside)),
        # After the norm: before it, a gate between 0 and 1 would be normalised away.
        gate=GatePoint(module=end, at="output", repeat=0),
        residue=tuple(path for path in (f"{out}.bias", *after) if path in shapes) if acts_on else (),
    )
