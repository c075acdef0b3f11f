"""CPM-Ant: pruning space, configs and formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cook.base.batches import Batch
from cook.families import cpm_ant_formats
from cook.families.head_dims import HeadDims, units_of_head
from cook.families.layout import Attention, FeedForward
from cook.families.rotary import Turned
from cook.families.stock_space import block_and_units
from cook.models import cook_experts, cpm_ant
from cook.pruning.family import Abilities, Adapter, KeptUnits, ModelConfig, Modeling, Shrunk, refuse_experts
from cook.pruning.units import GatePoint, PruningSpace, Site, UnitGroup, WeightSlice

MODEL_TYPE = cpm_ant.CpmAntConfig.model_type
LOGITS = "input_embedding.weight"
ATTENTION = Attention(
    modules={"self_att": "value"}, out="self_att.self_attention.attention_out", norms_before=(), remembers={}
)
FFN = FeedForward(modules={"ffn": "value"}, out="ffn.ffn.w_out", norms_before=())


def _config(config: ModelConfig) -> cpm_ant.CpmAntConfig:
    fields = {name: value for name, value in config.items() if name not in ("model_type", "auto_map")}
    return cpm_ant_formats.checked_config(fields)


def _units(layer: int, site: Site, dim_head: int, shapes: Mapping[str, tuple[int, ...]]) -> list[UnitGroup]:
    """A block and its heads or dims; none if the block was removed."""
    prefix, width = f"encoder.layers.{layer}", dim_head if site == "att" else 1
    table: Attention | FeedForward = ATTENTION if site == "att" else FFN
    if site == "att":
        ins = [f"{prefix}.self_att.self_attention.project_{part}.weight" for part in ("q", "k", "v")]
    else:
        ins = sorted(path for path in shapes if path.startswith(f"{prefix}.ffn.ffn.w_in."))
    out = WeightSlice(path=f"{prefix}.{table.out}.weight", dim=1, block=width)
    if out.path not in shapes:
        return []
    slices = (*(WeightSlice(path=path, dim=0, block=width) for path in ins), out)
    return block_and_units(table, site, shapes, layer, prefix, slices, width, {"size": shapes[out.path][1] // width})


def _hidden(shapes: Mapping[str, tuple[int, ...]]) -> UnitGroup:
    """The hidden dimensions: everything but the position biases is on the stream."""
    outs = tuple(f".{table.out}.weight" for table in (ATTENTION, FFN))
    slices, gates = [], [GatePoint(module="encoder", at="input", repeat=1)]
    for path, shape in shapes.items():
        module = path.removesuffix(".weight")
        if len(shape) == 1:
            gates.append(GatePoint(module=module, at="statistics"))
        if path.endswith(outs):
            gates.append(GatePoint(module=module, at="output", repeat=1))
        if path != "position_bias.relative_attention_bias":
            reads = len(shape) == 2 and not path.endswith(outs)
            slices.append(WeightSlice(path=path, dim=int(reads), block=1))
    return UnitGroup(
        kind="hidden",
        site="stream",
        layer=-1,
        size=shapes[LOGITS][1],
        slices=tuple(slices),
        gate=gates[0],
        more_gates=tuple(gates[1:]),
    )


def _head_dims(native: cpm_ant.CpmAntConfig, shapes: Mapping[str, tuple[int, ...]]) -> UnitGroup | None:
    """The head dimensions: nothing rotates, so each is a unit."""
    units = units_of_head(native.dim_head, Turned(0))
    assert units is not None
    made = HeadDims(units=units)
    for layer in range(native.num_layers):
        prefix = f"encoder.layers.{layer}.self_att.self_attention"
        out = f"{prefix}.attention_out"
        if f"{out}.weight" not in shapes:
            continue
        width = shapes[f"{out}.weight"][1]
        heads = width // native.dim_head
        for part in ("q", "k", "v"):
            path = f"{prefix}.project_{part}"
            piece = made.add(f"{path}.weight", 0, heads)
            if part == "q":
                made.gate(path, "output", width, piece)
        made.gate(out, "input", width, made.add(f"{out}.weight", 1, heads))
    return made.group() if made.gates else None


def _space(config: ModelConfig, head_unit: str = "kv_group") -> PruningSpace:
    # Every head has its own keys and values, so there is one kind of unit.
    native = _config(config)
    with torch.device("meta"):
        shapes = {path: tuple(t.shape) for path, t in cpm_ant.CpmAntForCausalLM(native).state_dict().items()}
    groups: list[UnitGroup] = []
    for layer in range(native.num_layers):
        groups += _units(layer, "att", native.dim_head, shapes) + _units(layer, "ffn", native.dim_head, shapes)
    return PruningSpace(
        num_layers=native.num_layers,
        shapes=shapes,
        groups=tuple(groups),
        logits_weight=LOGITS,
        hidden=_hidden(shapes),
        head_dims=_head_dims(native, shapes),
    )


def _shrink(config: ModelConfig, _space: PruningSpace, kept: KeptUnits, renumber: bool = True) -> Shrunk:
    native = _config(config)
    refuse_experts(native.experts or {})
    removed = native.mask_modules or [[False, False]] * native.num_layers
    heads = native.layer_heads or [list(range(native.num_heads))] * native.num_layers
    dims = native.layer_dim_ff or [native.dim_ff] * native.num_layers
    new_removed, new_heads, new_dims = [], [], []
    for layer in range(native.num_layers):
        name = f"layers.{layer}"
        kept_heads = [heads[layer][i] for i in kept.get(f"{name}.heads", range(len(heads[layer])))]
        kept_dims = len(kept.get(f"{name}.dimff", range(dims[layer])))
        gone_att = removed[layer][0] or not kept.get(f"{name}.att", (0,)) or not kept_heads
        gone_ffn = removed[layer][1] or not kept.get(f"{name}.ffn", (0,)) or not kept_dims
        new_removed.append([bool(gone_att), bool(gone_ffn)])
        new_heads.append([] if gone_att else kept_heads)
        new_dims.append(0 if gone_ffn else kept_dims)
    out = dict(config) | {"mask_modules": new_removed if any(any(pair) for pair in new_removed) else None}
    sizes = {size for size in new_dims if size}
    # If all sizes are equal, the plain field describes the weights.
    out |= {"dim_ff": sizes.pop(), "layer_dim_ff": None} if len(sizes) == 1 else {"layer_dim_ff": new_dims}
    all_heads = list(range(native.num_heads))
    out["dim_head"] = len(kept.get("head_dims", range(native.dim_head)))
    out["dim_model"] = len(kept.get("hidden", range(native.dim_model)))
    out["layer_heads"] = None if all(h in ([], all_heads) for h in new_heads) else new_heads
    out["unpruned"] = _sizes_before(native, out)
    return Shrunk(config=out, layers=tuple(range(native.num_layers)))


def _sizes_before(native: cpm_ant.CpmAntConfig, shrunk: ModelConfig) -> dict[str, Any] | None:
    """`CpmAntConfig.unpruned` of a model cut from `native`; None if what is left has the sizes that it had."""
    small = _config(dict(shrunk) | {"unpruned": None})
    before, own = native.sizes_before(), small.sizes_before()
    for name, has in (("heads", small.has_attention), ("dim_ff", small.has_ffn)):
        pairs = zip(before[name], own[name], strict=True)
        before |= {name: [size if has(layer) else unused for layer, (size, unused) in enumerate(pairs)]}
    return None if before == own else before


def _live_format(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]] | str:
    native = _config(config)
    layers = range(native.num_layers)
    if native.experts:
        return "its FFN blocks are mixtures of experts"
    sizes = {native.dim_ff_of(i) for i in layers if native.has_ffn(i)}
    if len(sizes) > 1:
        return f"its FFN blocks differ in size ({', '.join(map(str, sorted(sizes)))})"
    if any(len(native.heads_of(i)) < native.num_heads for i in layers if native.has_attention(i)):
        what = "its attention blocks keep different heads, but that format has one position-bias table that all "
        return what + "blocks index by head number"
    fields = {name: getattr(native, name) for name in cpm_ant_formats.NATIVE_FIELDS}
    fields |= {"dim_ff": sizes.pop() if sizes else native.dim_ff}
    return fields, cpm_ant_formats.by_own_sizes(native, tensors)


def _read(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]]:
    if config.get("model_type") == "cpmant":
        fields, tensors = cpm_ant_formats.from_stock(dict(config), tensors)
        return {"model_type": MODEL_TYPE} | fields, tensors
    if "model_type" not in config:
        fields = {"model_type": MODEL_TYPE} | cpm_ant_formats.native_config(dict(config))
        # That JSON does not distinguish the older FFN from the gated one; the weights do.
        return fields | ({"gated_ffn": False} if any(map(cpm_ant_formats.OLDER.fullmatch, tensors)) else {}), tensors
    # A config.json may leave out what has its default, such as the length of the prompt.
    native = _config(config)
    return {name: getattr(native, name) for name in cpm_ant_formats.NATIVE_FIELDS} | dict(config), tensors


def _with_facts(batch: Batch) -> Batch:
    rows = batch["segment"], batch["context"], batch.get("span"), batch["length"]
    return batch | {"facts": cpm_ant.Facts.of(*rows)}


MODELING = Modeling(
    file=Path(cpm_ant.__file__),
    auto_map={
        "AutoConfig": "modeling_cook_cpm_ant.CpmAntConfig",
        "AutoModelForCausalLM": "modeling_cook_cpm_ant.CpmAntForCausalLM",
    },
    imported=(Path(cook_experts.__file__),),
)
ADAPTER = Adapter(
    family="CPM-Ant",
    model_types=frozenset({MODEL_TYPE, "cpmant", None}),
    space=_space,
    head_units=lambda config: ("kv_group",),
    build=lambda config: cpm_ant.CpmAntForCausalLM(_config(config)),
    read=_read,
    shrink=_shrink,
    stock_holds=lambda config, heads, kv_heads, hidden=None, head_dim=None: (
        True
    ),  # its export always contains the modeling file
    modeling=lambda config: MODELING,
    inputs=lambda batch: batch,
    on_host=_with_facts,
    abilities=Abilities(shares_keys=False, stock_heads=False, stock_layers=False, is_stock=False),
    score_bias=True,
    experts=lambda config: config.get("experts") or {},
    with_experts=lambda config, experts: dict(config) | {"experts": dict(experts)},
    aliases={"ffn.ffn.w_in.w.weight": ("ffn.ffn.w_in.w_0.weight", "ffn.ffn.w_in.w_1.weight")},
    live_format=_live_format,
)
