"""The hidden dimensions of a stock model: every weight that reads or writes the residual stream.

Inside a layer, the family's table names the products that read the stream and those that add to it. Outside, a module's
kind and sizes tell: an embedding of the hidden size writes the stream; so does a product with as many outputs, such as
the transform of BERT's head, whose outputs are those of the embedding that it is tied to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from cook.families.experts import MULTIPLE, stream_dims
from cook.families.layout import Family
from cook.models import ragged
from cook.pruning.units import GatePoint, UnitGroup, WeightSlice


@dataclass(kw_only=True)
class _Found:
    slices: dict[tuple[str, int], WeightSlice] = field(default_factory=dict)
    gates: list[GatePoint] = field(default_factory=list)


def hidden_dims(
    family: Family, config: PreTrainedConfig, model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> UnitGroup | None:
    """The group of a model's hidden dimensions; None if the hidden states are the model's output, or if a weight on the
    stream has no place in the rules above.

    Args:
        family: The family's table.
        config: The model's config.
        model: The model, without weights.
        shapes: The shapes of its weights; tied weights appear once.
    """
    if family.auto_class == "AutoModel" or family.hidden_stays:
        return None
    size = stream_size(family, config, model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = _Found()
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        own = {name: shapes[f"{path}.{name}"] for name in names if f"{path}.{name}" in shapes}
        layer, name = _layer_of(family, path)
        role = _role(family, name) if layer else ""
        if role == "experts":
            _experts(found, family, path, name, own, size)
            continue
        if role == "inside":
            continue
        if not own and not isinstance(module, torch.nn.Embedding):
            if tuple(getattr(module, "normalized_shape", ())) == (size,):
                found.gates.append(GatePoint(module=path, at="statistics"))
            elif type(module).__name__.endswith("Norm"):
                return None  # without weights, it cannot be told whether it is on the stream
            continue
        if role == "out":
            _writes(found, path, module, own, _gated(model, path))
        elif role == "shared":
            _slice(found, f"{path}.weight", 0)
        elif "weight" in own and (role == "in" or (not layer and isinstance(module, torch.nn.Linear | Conv1D))):
            ins = _in_dim(module)
            if own["weight"][ins] == size:
                _slice(found, f"{path}.weight", ins)
            elif role == "in":
                return None
            if not layer and module is not head and own["weight"][1 - ins] == size:
                _writes(found, path, module, own, path)
        elif isinstance(module, torch.nn.Embedding):
            if module.embedding_dim == size:
                if own:
                    _slice(found, f"{path}.weight", 1, power=-0.5 if family.embedding_times_root else 0.0)
                found.gates.append(GatePoint(module=path, at="output", repeat=1))
        elif _is_norm(module) and own.get("weight") == (size,):
            found.gates.append(GatePoint(module=path, at="statistics"))
            for end in own:
                _slice(found, f"{path}.{end}", 0)
        elif any(size in shape for shape in own.values()):
            return None
    if family.embedding_times_root and head is not None and head.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        # The tied table grows by √(old/new); the last norm takes that back from the logits.
        path = f"{family.embedding_times_root}.weight"
        found.slices[path, 0] = WeightSlice(path=path, dim=0, block=1, power=0.5, added=1.0)
    if not found.gates:  # no block is left, by which the size of the stream would be known
        return None
    first, *more = sorted(found.gates, key=lambda gate: gate.at == "statistics")
    return UnitGroup(
        kind="hidden",
        site="stream",
        layer=-1,
        size=size,
        slices=tuple(found.slices.values()),
        gate=first,
        more_gates=tuple(more),
        multiple=MULTIPLE if family.experts is not None and size % MULTIPLE == 0 else 1,
    )


def stream_size(family: Family, config: PreTrainedConfig, model: torch.nn.Module) -> int:
    """The hidden size, which that of the config may exceed: from a product that adds to the stream, or a router."""
    for path, module in model.named_modules():
        layer, name = _layer_of(family, path)
        weight = getattr(module, "weight", None)
        if layer and isinstance(weight, torch.Tensor) and name in (family.attention.out, family.ffn.out):
            return int(weight.shape[1 - _in_dim(module)])
        if family.experts and name == family.experts.router and isinstance(weight, torch.Tensor):
            return int(weight.shape[1])
    return int(getattr(family.own_config(config), family.names.hidden))


def _layer_of(family: Family, path: str) -> tuple[str, str]:
    """The layer's number and the path inside the layer; empty outside of the layers."""
    rest = path.removeprefix(f"{family.layers}.")
    layer, _, name = rest.partition(".")
    return (layer, name) if rest != path else ("", "")


def _role(family: Family, name: str) -> str:
    """What a module of a layer does with the stream; `inside`: nothing, it is inside a block."""
    attention, ffn, experts = family.attention, family.ffn, family.experts
    if experts is not None:
        if name in (experts.router, experts.module):
            return "experts"
        if name == experts.shared_out:
            return "shared"
        if name in experts.shared:
            return "in"
    if name in (attention.out, ffn.out):
        return "out"
    reads = attention.reads or (attention.q, attention.k, attention.v, *attention.positions.values())
    if name in (*reads, *ffn.ins):
        return "in"
    is_inside = any(name == part or name.startswith(f"{part}.") for part in (*attention.modules, *ffn.modules))
    return "inside" if is_inside else ""


def _experts(
    found: _Found, family: Family, path: str, name: str, own: Mapping[str, tuple[int, ...]], size: int
) -> None:
    """The slices of a router or of experts, and the gate at the end of their block."""
    table = family.experts
    assert table is not None
    for end, shape in own.items():
        for dim in stream_dims(table, f"{name}.{end}"):
            if dim is not None:
                assert shape[dim] == size
                _slice(found, f"{path}.{end}", dim)
    if name == table.module:
        block = f"{path.removesuffix(name)}{table.block}"
        found.gates.append(GatePoint(module=block, at="output", repeat=1))


def _gated(model: torch.nn.Module, path: str) -> str:
    """The module whose output is that of a block's last product: what replaces the block if only a bias remains."""
    parents = [path.rsplit(".", count)[0] for count in range(path.count(".") + 1)]
    return next((p for p in parents if isinstance(model.get_submodule(p), ragged.Absent)), path)


def _writes(found: _Found, path: str, module: torch.nn.Module, own: Mapping[str, tuple[int, ...]], gated: str) -> None:
    if "weight" in own:
        _slice(found, f"{path}.weight", 1 - _in_dim(module))
    if "bias" in own:
        _slice(found, f"{path}.bias", 0)
    found.gates.append(GatePoint(module=gated, at="output", repeat=1))


def _slice(found: _Found, path: str, dim: int, power: float = 0.0) -> None:
    found.slices[path, dim] = WeightSlice(path=path, dim=dim, block=1, power=power)


def _is_norm(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.LayerNorm) or type(module).__name__.endswith("Norm")


def _in_dim(module: torch.nn.Module) -> int:
    return 0 if isinstance(module, Conv1D) else 1
