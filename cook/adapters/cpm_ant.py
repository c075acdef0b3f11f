"""CPM-Ant: `PruningSpace`, configs, formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cook.adapters.protocol import Adapter, KeptUnits, ModelConfig
from cook.models import cpm_ant, cpm_ant_formats
from cook.space.units import GatePoint, PruningSpace, UnitGroup, WeightSlice

CPM_LIVE_FIELDS = (
    "vocab_size", "dim_model", "dim_ff", "num_layers", "num_heads", "dim_head", "dropout_p",
    "position_bias_num_buckets", "position_bias_max_distance", "eps", "half", "prompt_types", "prompt_length",
    "segment_types", "mask_modules",
)  # fmt: skip


def _config(config: ModelConfig) -> cpm_ant.CpmAntConfig:
    return cpm_ant.CpmAntConfig(**{k: v for k, v in config.items() if k not in ("model_type", "auto_map")})


def _attention(layer: int, num_heads: int, dim_head: int, shapes: Mapping[str, Any]) -> list[UnitGroup]:
    block = f"encoder.layers.{layer}.self_att"
    inner = f"{block}.self_attention"
    projections = tuple(
        WeightSlice(path=f"{inner}.project_{p}.weight", dim=0, block=dim_head) for p in ("q", "k", "v")
    )
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


def _block_and_units(layer, site, block, last_module, slices, size, width, shapes) -> list[UnitGroup]:
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


def _space(config: ModelConfig) -> PruningSpace:
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
    return PruningSpace(num_layers=native.num_layers, shapes=shapes, groups=tuple(groups))


def _shrunk_config(config: ModelConfig, kept: KeptUnits) -> dict[str, Any]:
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
    # One size for all keeps the plain field true to the weights.
    out |= {"dim_ff": sizes.pop(), "layer_dim_ff": None} if len(sizes) == 1 else {"layer_dim_ff": new_dims}
    all_heads = list(range(native.num_heads))
    out["layer_heads"] = None if all(h in ([], all_heads) for h in new_heads) else new_heads
    return out


def _live_config(config: ModelConfig) -> dict[str, Any] | str:
    native = _config(config)
    if native.layer_dim_ff:
        return f"its FFN blocks differ in size ({', '.join(str(d) for d in sorted(set(native.layer_dim_ff)))})"
    if native.layer_heads:
        return (
            "its attention blocks keep heads of their own, while that format has one position-bias table that all "
            "blocks read by head number"
        )
    return {name: getattr(native, name) for name in CPM_LIVE_FIELDS}


def _read(config: ModelConfig, tensors: Mapping[str, torch.Tensor]):
    if config.get("model_type") == "cpmant":
        return cpm_ant_formats.from_stock(dict(config), tensors)
    if "model_type" not in config:
        return cpm_ant_formats.native_config(dict(config)), tensors
    return dict(config), tensors


ADAPTER = Adapter(
    family="cpm_ant",
    model_types=frozenset({"cook_cpm_ant", "cpmant", None}),  # type: ignore[arg-type]
    space=_space,
    build=lambda config: cpm_ant.CpmAntForCausalLM(_config(config)),
    read=_read,
    shrunk_config=_shrunk_config,
    aliases={"ffn.ffn.w_in.w.weight": ("ffn.ffn.w_in.w_0.weight", "ffn.ffn.w_in.w_1.weight")},
    logits_weight="input_embedding.weight",
    modeling_file=Path(cpm_ant.__file__),
    auto_map={
        "AutoConfig": "modeling_cook_cpm_ant.CpmAntConfig",
        "AutoModelForCausalLM": "modeling_cook_cpm_ant.CpmAntForCausalLM",
    },
    live_config=_live_config,
)
