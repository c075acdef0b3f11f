"""Adapters of stock transformers families, made from their tables, and the configs of reshaped stock models.

A reshaped model has a stock config if that gives the same weights, else a ragged one. Sizes are read from a model on
the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from transformers import PreTrainedConfig

from cook.base.batches import Batch
from cook.base.errors import UserError
from cook.families import stock_models, stock_space
from cook.families.experts import expert_sizes
from cook.families.head_dims import turned_of
from cook.families.layout import Family
from cook.families.rotary import with_pairs, without_factors
from cook.families.stock_models import (
    config_object,
    is_ragged,
    plain,
    ragged_config,
    remembered,
    skeleton,
    weight_shapes,
)
from cook.families.stock_space import Heads, head_dim_of, heads_of
from cook.families.stock_structure import Shapes, structure_of
from cook.families.stream import stream_size
from cook.models import ragged
from cook.pruning.counts import kept_shapes
from cook.pruning.family import Abilities, Adapter, KeptUnits, ModelConfig, Shrunk, refuse_experts
from cook.pruning.units import PruningSpace, UnitGroup


def stock_adapter(
    family: Family,
    variant: Callable[[Family, ModelConfig], Family] = lambda family, _config: family,
    inputs: Callable[[Batch], dict[str, Any]] | None = None,
    is_causal: bool = True,
    inputs_by_config: Callable[[ModelConfig, Batch], Batch] | None = None,
    mixes_samples: Callable[[ModelConfig], bool] = lambda _config: False,
) -> Adapter:
    """Makes the adapter of a family.

    Args:
        family: The family's table.
        variant: Adapts the table to a config, if config fields change names or norms.
        inputs: The model's arguments for a batch, if `packed_inputs` would mix samples.
        is_causal: Whether the model predicts the next token.
        inputs_by_config: As `inputs`, if they depend on the config.
        mixes_samples: Whether a model of this config cannot separate samples in one row.
    """

    def of_config(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda config, *more, **named: function(variant(family, config), config, *more, **named)

    return Adapter(
        family=family.family,
        model_types=family.model_types,
        space=of_config(stock_space.space),
        head_units=of_config(stock_space.head_units),
        build=of_config(stock_models.build),
        read=of_config(stock_models.read),
        file_names=of_config(stock_models.file_names),
        shrink=of_config(shrink),
        stock_holds=of_config(holds_heads),
        modeling=stock_models.modeling,
        experts=stock_models.experts,
        with_experts=of_config(stock_models.with_experts),
        with_biases=of_config(stock_models.with_biases),
        inputs=inputs or packed_inputs,
        inputs_by_config=inputs_by_config,
        abilities=Abilities(
            shares_keys=stock_space.can_share_keys(family),
            experts=family.experts is not None,
            stock_dims=family.names.ffn is not None,
            head_dims=bool(family.attention.head_dim),
            hidden=not family.hidden_stays,
            stock_heads=family.names.head_dim is not None,
            stock_heads_except=family.stock_heads_except,
            stock_layers=family.empty_layer_is_identity,
        ),
        is_causal=is_causal,
        mixes_samples=mixes_samples,
    )


def packed_inputs(batch: Batch) -> Batch:
    """A causal model's arguments: positions restart with every sample, by which transformers separates samples.

    It does so only without an attention mask and without a cache. Padding counts as samples of one token.
    """
    return {"input_ids": batch["input"], "position_ids": batch["position"], "use_cache": False}


def masked_inputs(batch: Batch, *, causal: bool) -> dict[str, Any]:
    """The arguments of a class that does not separate samples by positions: a mask separates them."""
    sample_BL = (batch["position"] == 0).cumsum(1)
    mask_BQK = sample_BL[:, :, None] == sample_BL[:, None, :]
    mask_BQK = mask_BQK.tril() if causal else mask_BQK
    inputs = {"input_ids": batch["input"], "position_ids": batch["position"], "attention_mask": mask_BQK[:, None]}
    return inputs | ({"use_cache": False} if causal else {})


def windowed_inputs(config: ModelConfig, batch: Batch) -> dict[str, Any]:
    """The arguments of a class that ignores positions in its masks, and has layers with a sliding window."""
    position, places = batch["position"], torch.arange(batch["position"].shape[1], device=batch["position"].device)
    sample_BL = (position == 0).cumsum(1)
    full_BQK = (sample_BL[:, :, None] == sample_BL[:, None, :]).tril()
    near_QK = places[:, None] - places < (config.get("sliding_window") or len(places))
    masks = {"full_attention": full_BQK, "sliding_attention": full_BQK & near_QK}
    added = {name: torch.where(mask[:, None], 0.0, -1e9) for name, mask in masks.items()}
    return packed_inputs(batch) | {"attention_mask": added}


def shrink(family: Family, config: ModelConfig, space: PruningSpace, kept: KeptUnits, renumber: bool = True) -> Shrunk:
    """The config of the reshaped model; layers without blocks are removed, and the others renumbered.

    Without `renumber` all layers stay, also those without blocks.
    """
    refuse_experts(stock_models.experts(config))
    counts = {name: len(units) for name, units in kept.items()}
    left = kept_shapes(space, counts)
    layers = [n for n in range(space.num_layers) if any(path.startswith(f"{family.layers}.{n}.") for path in left)]
    if not (renumber and family.empty_layer_is_identity):
        layers = list(range(space.num_layers))
    if family.first_layer_stays:
        layers = sorted({0, *layers})
    layers = layers or [space.num_layers - 1]  # transformers classes are not tested without any layer
    hidden = len(kept.get("hidden", ())) or (space.hidden.size if space.hidden else None)
    renamed = _renamed(family, left, layers)
    shapes = {renamed.get(path, path): shape for path, shape in left.items()}
    base = _with_layers(family, config, layers) | remembered(config, space.num_layers, layers)
    made, dim = config_object(config), head_dim_of(family, config_object(config))
    new_dim = _kept_dim(space, kept, dim)
    cut = kept["head_dims"] if new_dim != dim else None
    pairs, turned = list[int](), dict[str, Any]()
    if cut is not None or family.attention.turned:
        pairs, turned = _turned(family, made, skeleton(family, config), cut, new_dim)
    all_heads = [_heads(family, config, space, kept, layer) for layer in layers]
    if family.heads_stay or family.attention.slopes:
        all_heads = _with_slopes(family, config, space, kept, layers, all_heads)
    uniform = _uniform(family, base, shapes, all_heads, hidden)
    scaling = family.attention.scaling if family.attention.clipped else ""
    factor = family.of_layers(skeleton(family, config), scaling)
    if uniform is not None and holds(family, family.with_fields(uniform, turned), shapes, factor):
        uniform = family.with_fields(uniform, turned)
        stock = {"architectures": [type(skeleton(family, uniform)).__name__]}
        return Shrunk(config=plain(config_object(uniform)) | stock, layers=tuple(layers), renamed=renamed)
    base = _with_hidden(family, base, hidden)
    if cut is not None and family.names.head_dim:
        base = family.with_fields(base, _head_fields(family, base, new_dim))
    own = family.own_config(base)
    # An earlier export wrote a size of heads for the class's rotary positions, where the table has none.
    was_cut = family.names.head_dim is None and own.get("head_dim") is not None
    even = family.with_fields(
        base, {"rope_parameters": without_factors(own["rope_parameters"])} if turned or was_cut else {}
    )
    if was_cut:
        del family.own_config(even)["head_dim"]
    on_stream = [f"{norm.module}." for norm in space.hidden.norms] if space.hidden else []
    moved = _renamed(family, on_stream, layers)
    structure = structure_of(
        family,
        even,
        shapes,
        heads=all_heads,
        hidden=hidden or own[family.names.hidden],
        norms=[moved.get(path, path)[:-1] for path in on_stream],
        pairs=pairs,
        factor=factor,
    )
    if structure["rebuilt"]:  # the loss that balances experts needs the same number in all layers
        base = base | {"output_router_logits": False}
    if new_dim != head_dim_of(family, config_object(even)):
        structure["head_dim"] = new_dim
    uneven = ragged_config(family, family.with_fields(base, turned), structure)
    return Shrunk(config=uneven, layers=tuple(layers), renamed=renamed)


def _kept_dim(space: PruningSpace, kept: KeptUnits, head_dim: int) -> int:
    """The dimensions of a head that stay."""
    group = space.head_dims
    return head_dim if group is None or "head_dims" not in kept else len(kept["head_dims"]) * group.members


def _turned(
    family: Family, config: PreTrainedConfig, model: torch.nn.Module, units: Sequence[int] | None, head_dim: int
) -> tuple[list[int], dict[str, Any]]:
    """The pairs among these units that rotary positions turn, by their numbers in the stock model's table if it has
    one, and the fields of the config by which they turn as before; None: all units stay, and the fields.
    """
    turned = turned_of(family, config, model)
    pairs = range(turned.number // 2 if turned else 0)
    kept = [*pairs] if units is None else [unit for unit in units if unit in pairs]
    if family.attention.from_table:
        own = (getattr(module, ragged.PAIRS) for module in model.modules() if hasattr(module, ragged.PAIRS))
        numbers = next(own, pairs)
        return [numbers[pair] for pair in kept], {}
    if units is None or not pairs:
        return kept, {}
    return kept, with_pairs(family.own_config(config), family.own_part(model), kept, head_dim)


def _uniform(
    family: Family, base: ModelConfig, shapes: Shapes, heads: list[Heads | None], hidden: int | None
) -> dict[str, Any] | None:
    """The stock config with the sizes that all layers have; None if they differ, or if a block is missing."""
    table, dense, mixed = family.experts, set[int](), set[tuple[int, int]]()
    width = hidden or family.own_config(base)[family.names.hidden]
    for number in range(len(heads)):
        layer = f"{family.layers}.{number}"
        out = shapes.get(f"{layer}.{family.ffn.out}.weight")
        found = None if table is None else expert_sizes(table, shapes, layer)
        if found is not None:
            mixed.add(found)
        elif out is not None:
            dense.add(prod(out) // width)
        else:
            return None
    first = heads[0]
    if len({*heads}) > 1 or first is None or first.per_key or first.slopes or max(len(dense), len(mixed)) > 1:
        return None
    made = _sized(family, base, first, next(iter(dense), None), hidden)
    for count, dims in mixed if table is not None else ():
        assert table is not None
        made |= {table.count: count, table.dims: dims}
        if table.shared_count and not base[table.shared_count] * base[table.dims] % dims:
            made[table.shared_count] = base[table.shared_count] * base[table.dims] // dims
    return made


def _sized(
    family: Family, base: ModelConfig, heads: Heads, ffn: int | None, hidden: int | None = None
) -> dict[str, Any]:
    """A stock config with these sizes in every layer; the hidden size, or that of FFN blocks, stays if it is None."""
    names = family.names
    fields: dict[str, Any] = {names.heads: heads.heads}
    fields |= {names.ffn: ffn} if names.ffn and ffn is not None else {}
    fields |= {names.kv_heads: heads.kv_heads} if isinstance(names.kv_heads, str) else {}
    fields |= _head_fields(family, base, heads.head_dim)
    if hidden is not None:
        own = family.own_config(base)
        fields |= {name: hidden for name in names.like_hidden if own.get(name, own[names.hidden]) == own[names.hidden]}
        fields |= {names.hidden: hidden}
    return family.with_fields(base, fields)


def _head_fields(family: Family, base: ModelConfig, head_dim: int) -> dict[str, int]:
    """The fields of a stock config for heads of this size."""
    names, made = family.names, family.own_config(config_object(base))
    if names.head_dim is None:
        return {}
    before = getattr(made, names.head_dim, None)
    return {name: head_dim for name in (names.head_dim, *names.like_head_dim) if getattr(made, name, None) == before}


def _with_hidden(family: Family, base: dict[str, Any], hidden: int | None) -> dict[str, Any]:
    """The stock config with this hidden size, if its heads stay as they are; else unchanged, and the weights differ."""
    names = family.names
    if hidden in (None, family.own_config(base)[names.hidden]) or names.head_dim is None:
        return base
    head_dim = head_dim_of(family, config_object(base))
    changed = family.with_fields(base, {names.hidden: hidden, names.head_dim: head_dim})
    try:
        skeleton(family, changed)
    except (UserError, ValueError):
        return base
    return changed


def holds(family: Family, config: ModelConfig, shapes: Shapes, factor: float | None = None) -> bool:
    """Whether a model freshly built from `config` has exactly these weights, and this factor of scores if given."""
    try:
        model = skeleton(family, config)
    except (UserError, ValueError):
        return False
    own_factor = family.of_layers(model, family.attention.scaling)
    return weight_shapes(model) == dict(shapes) and factor in (None, own_factor)


def holds_heads(
    family: Family,
    config: ModelConfig,
    heads: int,
    kv_heads: int,
    hidden: int | None = None,
    head_dim: int | None = None,
) -> bool:
    """Whether the stock class builds attention blocks with these heads, of this size or as wide as now, and this hidden
    size.
    """
    base, made = _with_layers(family, config, [0]), config_object(config)
    before = head_dim_of(family, made)
    dim = head_dim or before
    wanted = Heads(heads=heads, kv_heads=kv_heads, head_dim=dim)
    turned: dict[str, Any] = {}
    if dim != before and family.attention.clipped:
        return False
    if dim != before:
        model = skeleton(family, config)
        found = turned_of(family, made, model)
        pairs = range(found.number * dim // before // 2 if found else 0)
        _, turned = _turned(family, made, model, pairs, dim)
    try:
        ffn = family.own_config(base).get(family.names.ffn or "")
        model = skeleton(family, family.with_fields(_sized(family, base, wanted, ffn, hidden), turned))
    except (UserError, ValueError):
        return False
    is_wide = hidden in (None, stream_size(family, config_object(base), model))
    return is_wide and heads_of(family, dim, model, f"{family.layers}.0") == wanted


def _renamed(family: Family, paths: Iterable[str], layers: list[int]) -> dict[str, str]:
    prefixes = {f"{family.layers}.{old}.": f"{family.layers}.{new}." for new, old in enumerate(layers) if new != old}
    return {
        path: new + path.removeprefix(old) for path in paths for old, new in prefixes.items() if path.startswith(old)
    }


def _with_layers(family: Family, config: ModelConfig, layers: list[int]) -> dict[str, Any]:
    """The stock config with only these layers, all other sizes unchanged."""
    base = {name: value for name, value in config.items() if name not in ragged.OWN_FIELDS}
    base["model_type"] = config["stock_type"] if is_ragged(config) else config["model_type"]
    own = family.own_config(base)
    fields: dict[str, Any] = {family.names.layers: len(layers)}
    for name in family.names.per_layer:
        if isinstance(own.get(name), list | tuple):
            fields[name] = [own[name][layer] for layer in layers]
    dense, step = family.names.dense_layers, family.names.sparse_step
    if dense:
        # Numbers of layers change, so the layers without experts are listed.
        listed = own.get(dense) or ()
        fields[dense] = [n for n, layer in enumerate(layers) if layer in listed or (layer + 1) % own.get(step, 1)]
        fields[step] = 1
    for name in family.names.first_layers:
        if isinstance(own.get(name), int):
            fields[name] = sum(layer < own[name] for layer in layers)
    return family.with_fields(base, fields)


def _heads(family: Family, config: ModelConfig, space: PruningSpace, kept: KeptUnits, layer: int) -> Heads | None:
    """The heads that the layer keeps; None for a block without units."""
    counts = {name: len(units) for name, units in kept.items()}
    att = next((g for g in space.of("heads") if g.layer == layer and _left(space, counts, g)), None)
    if att is None:
        return None
    dim = _kept_dim(space, kept, head_dim_of(family, config_object(config)))
    if att.head_unit == "query_head":
        return _by_key(att, space.keys_of(att), kept, dim)
    queries, keys = att.heads(counts.get(att.name, att.size))
    return Heads(heads=queries, kv_heads=keys, head_dim=dim)


def _with_slopes(
    family: Family,
    config: ModelConfig,
    space: PruningSpace,
    kept: KeptUnits,
    layers: list[int],
    all_heads: list[Heads | None],
) -> list[Heads | None]:
    """The heads where a head is more than its weights: with their original numbers, or all heads that there are."""
    model, dim = skeleton(family, config), head_dim_of(family, config_object(config))
    groups = {group.layer: group for group in space.of("heads")}
    found: list[Heads | None] = []
    for layer, heads in zip(layers, all_heads, strict=True):
        before = heads_of(family, dim, model, f"{family.layers}.{layer}")
        blocks = [g for g in space.of("layer", "att") if g.layer == layer]
        if family.heads_stay and before is not None and all(kept.get(g.name, (0,)) for g in blocks):
            heads = replace(before, head_dim=_kept_dim(space, kept, dim))
        elif heads is not None and before is not None:
            group = groups[layer]
            numbers = before.slopes or tuple(range(before.heads))
            units = kept.get(group.name, range(group.size))
            own = tuple(numbers[unit * group.members + member] for unit in units for member in range(group.members))
            heads = replace(heads, slopes=own if before.slopes or own != numbers else ())
        found.append(heads)
    return found


def _by_key(att: UnitGroup, keys: UnitGroup | None, kept: KeptUnits, head_dim: int) -> Heads:
    """The query heads that each of the key-value heads keeps that stay."""
    mask = torch.zeros(att.size, dtype=torch.long)
    mask[list(kept.get(att.name, range(att.size)))] = 1
    numbers = [int(part.sum()) for part in mask.split(att.spans)]
    stay = range(att.sections) if keys is None else kept.get(keys.name, range(att.sections))
    per_key = tuple(numbers[key] for key in stay)
    is_even = len(set(per_key)) == 1
    return Heads(heads=sum(per_key), kv_heads=len(per_key), head_dim=head_dim, per_key=() if is_even else per_key)


def _left(space: PruningSpace, counts: Mapping[str, int], group: UnitGroup) -> int:
    return group.kind != "layer" and min(counts.get(group.name, group.size), counts.get(space.block(group).name, 1))
