"""CPM-Ant: pruning space, configs and formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cook.base.errors import UserError
from cook.families import cpm_ant_formats
from cook.models import cpm_ant
from cook.pruning.family import Abilities, Adapter, KeptUnits, ModelConfig, Modeling, Shrunk
from cook.pruning.units import GatePoint, PruningSpace, Site, UnitGroup, WeightSlice

MODEL_TYPE = cpm_ant.CpmAntConfig.model_type
LOGITS = "input_embedding.weight"
OLDER_FFN = re.compile(r"encoder\.layers\.\d+\.ffn\.ffn\.w_in\.w\.weight")


def _config(config: ModelConfig) -> cpm_ant.CpmAntConfig:
    try:
        return cpm_ant.CpmAntConfig(**{k: v for k, v in config.items() if k not in ("model_type", "auto_map")})
    except (TypeError, ValueError) as error:
        raise UserError(f"the model's config contradicts itself: {error}") from None


def _attention(layer: int, num_heads: int, dim_head: int, shapes: Mapping[str, Any]) -> list[UnitGroup]:
    block = f"encoder.layers.{layer}.self_att"
    inner = f"{block}.self_attention"
    projections = tuple(WeightSlice(path=f"{inner}.project_{p}.weight", dim=0, block=dim_head) for p in ("q", "k", "v"))
    out = WeightSlice(path=f"{inner}.attention_out.weight", dim=1, block=dim_head, fan_in=True)
    return _block_and_units(
        layer, "att", block, f"{inner}.attention_out", (*projections, out), num_heads, dim_head, shapes
    )


def _feed_forward(layer: int, dim_ff: int, shapes: Mapping[str, Any]) -> list[UnitGroup]:
    block = f"encoder.layers.{layer}.ffn"
    first = sorted(path for path in shapes if path.startswith(f"{block}.ffn.w_in."))
    ins = tuple(WeightSlice(path=path, dim=0, block=1) for path in first)
    out = WeightSlice(path=f"{block}.ffn.w_out.weight", dim=1, block=1, fan_in=True)
    return _block_and_units(layer, "ffn", block, f"{block}.ffn.w_out", (*ins, out), dim_ff, 1, shapes)


def _block_and_units(
    layer: int,
    site: Site,
    block: str,
    last_module: str,
    slices: tuple[WeightSlice, ...],
    size: int,
    width: int,
    shapes: Mapping[str, Any],
) -> list[UnitGroup]:
    weights = [path for path in shapes if path.startswith(f"{block}.")]
    return [
        UnitGroup(
            kind="layer",
            site=site,
            layer=layer,
            size=1,
            slices=tuple(WeightSlice(path=path, dim=0, block=shapes[path][0]) for path in weights),
            gate=GatePoint(module=last_module, at="output", repeat=0),
        ),
        UnitGroup(
            kind="heads" if site == "att" else "dimff",
            site=site,
            layer=layer,
            size=size,
            slices=slices,
            gate=GatePoint(module=last_module, at="input", repeat=width),
        ),
    ]


def _space(config: ModelConfig, head_unit: str = "kv_group") -> PruningSpace:
    # Every head has its own keys and values, so there is one kind of unit.
    native = _config(config)
    with torch.device("meta"):
        shapes = {path: tuple(t.shape) for path, t in cpm_ant.CpmAntForCausalLM(native).state_dict().items()}
    groups: list[UnitGroup] = []
    for layer in range(native.num_layers):
        out = shapes.get(f"encoder.layers.{layer}.self_att.self_attention.attention_out.weight")
        if out:
            groups += _attention(layer, out[1] // native.dim_head, native.dim_head, shapes)
        out = shapes.get(f"encoder.layers.{layer}.ffn.ffn.w_out.weight")
        if out:
            groups += _feed_forward(layer, out[1], shapes)
    return PruningSpace(num_layers=native.num_layers, shapes=shapes, groups=tuple(groups), logits_weight=LOGITS)


def _shrink(config: ModelConfig, _space: PruningSpace, kept: KeptUnits, renumber: bool = True) -> Shrunk:
    native = _config(config)
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
    out["layer_heads"] = None if all(h in ([], all_heads) for h in new_heads) else new_heads
    return Shrunk(config=out, layers=tuple(range(native.num_layers)))


def _live_config(config: ModelConfig) -> dict[str, Any] | str:
    native = _config(config)
    layers = range(native.num_layers)
    sizes = {native.dim_ff_of(i) for i in layers if native.has_ffn(i)}
    if len(sizes) > 1:
        return f"its FFN blocks differ in size ({', '.join(map(str, sorted(sizes)))})"
    if any(len(native.heads_of(i)) < native.num_heads for i in layers if native.has_attention(i)):
        return (
            "its attention blocks keep different heads, but that format has one position-bias table that all "
            "blocks index by head number"
        )
    fields = {name: getattr(native, name) for name in cpm_ant_formats.NATIVE_FIELDS}
    return fields | {"dim_ff": sizes.pop() if sizes else native.dim_ff}


def _read(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]]:
    if config.get("model_type") == "cpmant":
        fields, tensors = cpm_ant_formats.from_stock(dict(config), tensors)
        return {"model_type": MODEL_TYPE} | fields, tensors
    if "model_type" not in config:
        fields = {"model_type": MODEL_TYPE} | cpm_ant_formats.native_config(dict(config))
        # That JSON does not distinguish the older FFN from the gated one; the weights do.
        return fields | ({"gated_ffn": False} if any(map(OLDER_FFN.fullmatch, tensors)) else {}), tensors
    return dict(config), tensors


MODELING = Modeling(
    file=Path(cpm_ant.__file__),
    auto_map={
        "AutoConfig": "modeling_cook_cpm_ant.CpmAntConfig",
        "AutoModelForCausalLM": "modeling_cook_cpm_ant.CpmAntForCausalLM",
    },
)
ADAPTER = Adapter(
    family="CPM-Ant",
    model_types=frozenset({MODEL_TYPE, "cpmant", None}),
    space=_space,
    head_units=lambda config: ("kv_group",),
    build=lambda config: cpm_ant.CpmAntForCausalLM(_config(config)),
    read=_read,
    shrink=_shrink,
    stock_holds=lambda config, heads, kv_heads: True,  # its export always contains the modeling file
    modeling=lambda config: MODELING,
    inputs=lambda batch: batch,
    abilities=Abilities(shares_keys=False, stock_heads=False, stock_layers=False, is_stock=False),
    aliases={"ffn.ffn.w_in.w.weight": ("ffn.ffn.w_in.w_0.weight", "ffn.ffn.w_in.w_1.weight")},
    live_config=_live_config,
)
