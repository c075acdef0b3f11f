"""Export of a masked encoder to a faster model: a smaller stock model, or one with tile-wise layers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

from cook.base.errors import UserError
from cook.base.files import write_json
from cook.base.tensor_files import ShardWriter, open_safetensors_folder, read_model_config
from cook.sparsity.compact import CompactLayer, MaskedMatrix, compact_layer
from cook.sparsity.kernels import (
    sparse_bert,
    sparse_build,
    sparse_int8,
    sparse_int8_source,
    sparse_layers,
    sparse_memory,
    sparse_native,
    sparse_plan,
    sparse_source,
    sparse_triton,
    sparse_ways,
)
from cook.sparsity.matrices import ENCODER_ROLES
from cook.sparsity.tiles import Tiles

NORMS = {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "output_norm"}
MODULE = "modeling_cook_sparse"
CARRIED = (
    sparse_build,
    sparse_int8,
    sparse_int8_source,
    sparse_layers,
    sparse_memory,
    sparse_native,
    sparse_plan,
    sparse_source,
    sparse_triton,
    sparse_ways,
)
"""The files that the modeling file needs; they are copied into an export."""
NOT_TOKENIZER = ("model", "pytorch_model", "config.json", "optimizer", "training_args", "README", ".")


@dataclass(frozen=True, kw_only=True)
class SparseExport:
    """The written export."""

    folder: Path
    kind: str
    """`stock`: loads without further options; `sparse`: loads with `trust_remote_code=True`."""
    parameters: tuple[int, int]
    """Parameters before and after, without index tensors."""
    notes: tuple[str, ...]
    """Notes for the user, one sentence each."""


def export_sparse(
    source: Path | str,
    output: Path | str,
    masks: Mapping[str, torch.Tensor],
    *,
    block: int | None = None,
    stock: bool | None = None,
    int8: bool = False,
) -> SparseExport:
    """Writes a masked encoder without its pruned weights.

    Args:
        source: A BERT folder with any of the heads of `sparse_bert.CLASSES`.
        output: The folder to write; an earlier export there is replaced.
        masks: By path; true where a weight is kept.
        block: B, if the pattern consists of B × B blocks.
        stock: True: always a stock model, even with zeros in it. None: a stock model if no zeros would remain in it.
        int8: The layers' weights are rounded to int8, with a scale per output; never a stock model.

    Raises:
        UserError: the model or the masks cannot be exported this way.
    """
    assert not (stock and int8)
    source, output = Path(source), Path(output)
    config, tensors = read_model_config(source), open_safetensors_folder(source)
    name = (config.get("architectures") or ["BertModel"])[0]
    if config.get("model_type") != "bert" or name not in sparse_bert.CLASSES:
        raise UserError(
            f"{source}: this model cannot be exported with sparse layers",
            wanted=f"BERT as {', '.join(sparse_bert.CLASSES)}",
            got=f"{config.get('model_type')}, {name}",
        )
    if int8 and config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{source}: this model cannot be exported in int8", wanted="gelu", got=config["hidden_act"])
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{output}: would overwrite the original model", remedy="choose another folder")
    if output.exists() and any(output.iterdir()) and not (output / "config.json").exists():
        raise UserError(f"{output}: the folder exists and does not contain a model", remedy="choose another folder")
    prefix = sparse_bert.CLASSES[name][2]
    layers = [_compact(tensors, masks, config, prefix, i, block) for i in range(config["num_hidden_layers"])]
    all_heads = all(len(layer.matrices["attention_output"].mask) == config["hidden_size"] for layer in layers)
    if stock is None:
        stock = not int8 and all_heads and all(layer.is_dense for layer in layers)
    aside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        if stock:
            count = _write_stock(aside, tensors, masks, config, layers, prefix)
        else:
            count = _write_sparse(aside, tensors, config, layers, prefix, int8)
        _copy_tokenizer(source, aside)
        shutil.rmtree(output, ignore_errors=True)
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    before = sum(tensor.numel() for key, tensor in tensors.items() if tensor.is_floating_point())
    return SparseExport(
        folder=output,
        kind="stock" if stock else "sparse",
        parameters=(before, count),
        notes=tuple(_notes(layers, config, stock, int8)),
    )


def _compact(
    tensors: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    prefix: str,
    layer: int,
    block: int | None,
) -> CompactLayer:
    matrices: dict[str, MaskedMatrix] = {}
    for end, role in ENCODER_ROLES.items():
        path = f"{prefix}encoder.layer.{layer}.{end}"
        weight = tensors[path]
        mask = masks.get(path, torch.ones_like(weight, dtype=torch.bool))
        if mask.shape != weight.shape:
            raise UserError(f"the mask does not fit {path}", wanted=tuple(weight.shape), got=tuple(mask.shape))
        bias = tensors[path.removesuffix("weight") + "bias"]
        matrices[role] = MaskedMatrix(weight=(weight * mask).T, mask=mask.bool().T, bias=bias)
    activation = ACT2FN[config.get("hidden_act", "gelu")]
    head_size = config["hidden_size"] // config["num_attention_heads"]
    return compact_layer(matrices, head_size=head_size, activation=activation, block=block)


def _write_sparse(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    layers: list[CompactLayer],
    prefix: str,
    int8: bool,
) -> int:
    count = 0
    with ShardWriter(folder) as writer:
        for name, tensor in _sparse_tensors(tensors, layers, prefix, int8):
            is_parameter = tensor.dtype == torch.int8 or tensor.is_floating_point() and not name.endswith(".scale")
            count += tensor.numel() * is_parameter
            writer.add(name, tensor)
    auto, own, _ = sparse_bert.CLASSES[(config.get("architectures") or ["BertModel"])[0]]
    written = {**config, "model_type": sparse_bert.SparseBertConfig.model_type, "architectures": [own]}
    written["sparse_layers"], written["sparse_int8"] = [layer.described() for layer in layers], int8
    written["auto_map"] = {"AutoConfig": f"{MODULE}.SparseBertConfig", auto: f"{MODULE}.{own}"}
    if auto != "AutoModel":
        written["auto_map"]["AutoModel"] = f"{MODULE}.SparseBertModel"
    write_json(folder / "config.json", written)
    shutil.copyfile(str(sparse_bert.__file__), folder / f"{MODULE}.py")
    for helper in CARRIED:
        shutil.copyfile(str(helper.__file__), folder / f"{helper.__name__.rpartition('.')[2]}.py")
    return count


def _sparse_tensors(
    tensors: Mapping[str, torch.Tensor], layers: list[CompactLayer], prefix: str, int8: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    stem = f"{prefix}encoder.layer."
    yield from ((name, tensor) for name, tensor in tensors.items() if not name.startswith(stem))
    for number, layer in enumerate(layers):
        target = f"{prefix}encoder.layers.{number}."
        yield from ((target + name, tensor) for name, tensor in layer.tensors(int8=int8).items())
        for old, new in NORMS.items():
            for key in ("weight", "bias"):
                yield f"{target}{new}.{key}", tensors[f"{stem}{number}.{old}.{key}"]


def _write_stock(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    layers: list[CompactLayer],
    prefix: str,
) -> int:
    """Shrinks all FFNs to the widest layer's size, padded with zeros; heads stay, pruned ones as zeros."""
    width = max(1, *(len(layer.matrices["output"].weight) for layer in layers))
    count = 0
    with ShardWriter(folder) as writer:
        for name, tensor in tensors.items():
            inside = name.startswith(f"{prefix}encoder.layer.")
            own = _shrunk(name.removeprefix(f"{prefix}encoder.layer."), layers, width) if inside else None
            if own is not None:
                tensor = own.to(tensor.dtype)
            elif name in masks:
                tensor = tensor * masks[name]
            count += tensor.numel() * tensor.is_floating_point()
            writer.add(name, tensor)
    write_json(folder / "config.json", {**config, "intermediate_size": width})
    return count


def _shrunk(name: str, layers: list[CompactLayer], width: int) -> torch.Tensor | None:
    """A tensor of the FFN, or a bias to which constants were added; None for other tensors."""
    number, _, end = name.partition(".")
    matrices = layers[int(number)].matrices
    missing = width - len(matrices["output"].weight)
    first, second = matrices["intermediate"], matrices["output"]
    return {
        "intermediate.dense.weight": lambda: torch.nn.functional.pad(first.weight.T, (0, 0, 0, missing)),
        "intermediate.dense.bias": lambda: torch.nn.functional.pad(first.bias, (0, missing)),
        "output.dense.weight": lambda: torch.nn.functional.pad(second.weight.T, (0, missing)),
        "output.dense.bias": lambda: second.bias,
    }.get(end, lambda: None)()


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(NOT_TOKENIZER) and path.suffix in (".json", ".txt", ".model"):
            shutil.copyfile(path, folder / path.name)


def _notes(layers: list[CompactLayer], config: Mapping[str, Any], stock: bool, int8: bool) -> Iterator[str]:
    heads = sum(layer.heads for layer in layers)
    total = len(layers) * config["num_attention_heads"]
    if heads < total:
        yield f"{total - heads} of {total} heads " + (
            "have no effect, but a stock BERT has hidden_size / head size heads: they stay as zeros"
            if stock
            else "are removed; a stock BERT cannot have fewer than hidden_size / head size"
        )
    widths = sorted({len(layer.matrices["output"].weight) for layer in layers})
    if stock and len(widths) > 1:
        yield f"FFNs keep {widths[0]} to {widths[-1]} dims; a stock BERT has one size, so zeros pad the smaller ones"
    dense = [
        name for layer in layers for name, tiles in layer.tiles.items() if _lies_dense(tiles, layer.matrices[name])
    ]
    if dense and not stock:
        how = (
            "dense, with their zeros"
            if int8
            else ("sparse on a CPU in fp32 if that is faster (this needs a C compiler), else dense, with their zeros")
        )
        yield f"{len(dense)} of {4 * len(layers)} matrices have no tiles: they run {how}"


def _lies_dense(tiles: Tiles, matrix: MaskedMatrix) -> bool:
    return len(tiles.members) == 1 and not matrix.mask[tiles.members[0][0]][:, tiles.members[0][1]].all()
