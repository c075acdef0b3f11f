"""GGUF files of quantized models, for llama.cpp: Q8_0 holds the 8-bit integers, Q4_0 the 4-bit ones.

A block of either holds 32 consecutive inputs of a row and one float16 scale. The scales of the schemes are such
numbers, so that the file has the integers and scales of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cook.base.errors import UserError
from cook.base.files import read_json
from cook.families.gguf_settings import (
    BYTE_LEVEL,
    FILE_TYPES,
    NONE,
    SENTENCEPIECE,
    add_settings,
    frequency_factors,
    gguf_architecture,
    row_order,
    split_name,
)
from cook.quantization.folders import check_modules, check_package
from cook.quantization.model import QuantizedModel
from cook.quantization.schemes import QuantizedWeight

BLOCK = 32
"""Inputs per block."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """Of the bytes, for blocks; else of the numbers."""
    type: Any
    """gguf's type of its numbers."""
    read: Callable[[], np.ndarray]


def write_gguf(model: QuantizedModel, file: Path, tokenizer: Path) -> list[str]:
    """Writes a GGUF file.

    Args:
        model: The model.
        file: The file to write.
        tokenizer: The folder with the tokenizer's files.

    Returns:
        Sentences on what the file lacks.

    Raises:
        UserError: the package gguf is missing, or the format cannot hold the model.
    """
    check_package("gguf", "gguf")
    architecture = gguf_architecture(model.source.config)
    check_modules(model, divides=False)
    group = model.scheme.group_size
    if model.scheme.is_float or (group and group % BLOCK):
        got = model.scheme.name + (f" with group_size {group}" if group else "")
        wanted = "int8, int8_weight, or int4 with a group_size that is a multiple of 32"
        raise UserError("--format gguf: cannot hold these numbers", wanted=wanted, got=got)
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    notes = add_settings(writer, model.source.config)
    notes += _add_tokenizer(writer, tokenizer, model.source.config["vocab_size"])
    writer.add_file_type(FILE_TYPES[model.scheme.bits])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    entries = list(_entries(model, gguf, architecture))
    for entry in entries:
        number = np.dtype({"F32": np.float32, "F16": np.float16}.get(entry.type.name, np.uint8))
        kind = entry.type if number == np.uint8 else None
        writer.add_tensor_info(
            entry.name, entry.shape, number, int(np.prod(entry.shape)) * number.itemsize, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(entry.read())
    writer.close()
    loose = [path for path, matrix in model.matrices.items() if matrix.inputs % BLOCK]
    if loose:
        notes.append(
            f"{len(loose)} modules, such as {loose[0]}, are stored in fp32 with the same values, since the number of "
            f"their inputs is not a multiple of {BLOCK}"
        )
    return notes


def _entries(model: QuantizedModel, gguf: Any, architecture: str) -> Iterator[_Entry]:
    config, kinds = model.source.config, gguf.GGMLQuantizationType
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])

    def own_name(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"--format gguf: the format has no place for {name}")
        return str(found)

    for path, matrix in model.matrices.items():
        name, bits = f"{path}.weight", matrix.scheme(model.scheme).bits
        order = row_order(name, config)

        def blocks(path: str = path, order: np.ndarray | None = order, bits: int = bits) -> np.ndarray:
            weight = model.weight(path)
            if order is not None:
                weight = QuantizedWeight(values_NK=weight.values_NK[order], scale_NG=weight.scale_NG[order])
            return _packed(weight, bits)

        def numbers(path: str = path, order: np.ndarray | None = order) -> np.ndarray:
            whole = model.weight(path).dequantized()
            return (whole if order is None else whole[order]).numpy()

        if matrix.inputs % BLOCK:
            yield _Entry(name=own_name(name), shape=(matrix.outputs, matrix.inputs), type=kinds.F32, read=numbers)
            continue
        kind = kinds.Q4_0 if bits == 4 else kinds.Q8_0
        row = matrix.inputs // BLOCK * (2 + BLOCK * bits // 8)
        yield _Entry(name=own_name(name), shape=(matrix.outputs, row), type=kind, read=blocks)
    for name, tensor in model.plain():
        order = row_order(name, config)
        is_half = tensor.ndim > 1 and tensor.dtype in (torch.float16, torch.bfloat16)
        kind = {torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}[tensor.dtype] if is_half else kinds.F32
        shape = tuple(tensor.shape)
        if kind == kinds.BF16:
            shape = (*shape[:-1], 2 * shape[-1])

        def plain(name: str = name, order: np.ndarray | None = order, is_half: bool = is_half) -> np.ndarray:
            tensor = model.source.tensors[name].detach()
            tensor = tensor if order is None else tensor[order]
            if is_half and tensor.dtype == torch.bfloat16:
                return tensor.contiguous().view(torch.uint8).numpy()
            return (tensor if is_half else tensor.float()).contiguous().numpy()

        yield _Entry(name=own_name(name), shape=shape, type=kind, read=plain)
    if (factors := frequency_factors(config)) is not None:
        yield _Entry(name="rope_freqs.weight", shape=factors.shape, type=kinds.F32, read=lambda: factors)


def _packed(weight: QuantizedWeight, bits: int) -> np.ndarray:
    """The blocks of a weight as bytes, one row per output."""
    rows, inputs = weight.values_NK.shape
    count = inputs // BLOCK
    scale = weight.scale_NG.repeat_interleave(count // weight.scale_NG.shape[1], dim=1).numpy().astype(np.float16)
    values = weight.values_NK.numpy().reshape(rows, count, BLOCK)
    if bits == 4:
        shifted = (values + 8).astype(np.uint8)
        # The low half of a byte is an input of the first half of the block.
        values = shifted[..., : BLOCK // 2] | (shifted[..., BLOCK // 2 :] << 4)
    packed = np.concatenate([scale[..., None].view(np.uint8), np.ascontiguousarray(values).view(np.uint8)], axis=-1)
    return packed.reshape(rows, -1)


def _add_tokenizer(writer: Any, folder: Path, size: int) -> list[str]:
    """Adds the tokenizer of a model folder; returns what is missing."""
    import gguf

    kinds, tokens, types, scores = gguf.TokenType, [], [], []
    file = folder / "tokenizer.json"
    described = read_json(file) if file.is_file() else {}
    split = split_name(described.get("pre_tokenizer")) if described.get("model", {}).get("type") == "BPE" else None
    if (folder / "tokenizer.model").is_file():
        tokens, scores, types = map(list, zip(*gguf.SentencePieceVocab(folder).all_tokens(), strict=True))
        writer.add_tokenizer_model(SENTENCEPIECE)
        writer.add_tokenizer_pre("default")
    elif split:
        added = {entry["id"]: entry for entry in described["added_tokens"]}
        by_id = {number: text for text, number in described["model"]["vocab"].items()}
        for number in range(max((*by_id, *added)) + 1):
            entry = added.get(number)
            text = entry["content"] if entry else by_id.get(number)
            kind = kinds.NORMAL if entry is None else kinds.CONTROL if entry["special"] else kinds.USER_DEFINED
            tokens.append(text or f"[PAD{number}]")
            types.append(kinds.UNUSED if text is None else kind)
        writer.add_tokenizer_model(BYTE_LEVEL)
        writer.add_tokenizer_pre(split)
    else:
        writer.add_tokenizer_model(NONE)
        return ["the file has no tokenizer: cook writes SentencePiece models and byte-level BPE (tokenizer.json)"]
    if len(tokens) > size:
        raise UserError(f"{folder}: the tokenizer has more tokens than the model", wanted=size, got=len(tokens))
    unused = range(len(tokens), size)
    writer.add_token_list([*tokens, *(f"[PAD{number}]" for number in unused)])
    writer.add_token_types([*types, *(kinds.UNUSED for _ in unused)])
    if scores:
        writer.add_token_scores([*scores, *(-1e4 for _ in unused)])
    gguf.SpecialVocab(folder, load_merges=not scores, n_vocab=size).add_to_gguf(writer, quiet=True)
    return []
