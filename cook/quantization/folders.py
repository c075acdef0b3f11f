"""Folders of quantized models: torchao's format for transformers, and compressed-tensors, which vLLM reads."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cook.base.errors import UserError
from cook.export.model_folder import write_model_folder
from cook.quantization.model import QuantizedModel
from cook.quantization.schemes import Matrix, Scheme


def check_package(name: str, module: str) -> None:
    """Raises a UserError if a package that a format needs is not installed."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"this format needs the package {name}, which is not installed", remedy=f"pip install {name}")


def check_modules(model: QuantizedModel, *, divides: bool) -> None:
    """Checks that a format can hold the modules.

    Args:
        model: The model.
        divides: Whether modules may divide by the square root of their input size.

    Raises:
        UserError: names a module that it cannot hold.
    """
    for path, matrix in model.matrices.items():
        if matrix.is_transposed or (matrix.divides and not divides):
            kind = "its weight is stored as [inputs, outputs]" if matrix.is_transposed else "it divides by √inputs"
            raise UserError(
                f"{path}: this format holds modules of the class torch.nn.Linear alone",
                got=f"{kind} in {model.source.adapter.family}",
                remedy="models of this family cannot be stored in few bits",
            )


def write_torchao_folder(model: QuantizedModel, folder: Path) -> list[str]:
    """Writes a folder that `from_pretrained` of transformers loads, with torchao's tensors and `quantization_config`.

    4-bit integers take a byte each: torchao's packed formats are for single kinds of GPUs.

    Returns:
        Sentences on what is not stored in few bits.

    Raises:
        UserError: a package is missing, or the format cannot hold the model.
    """
    check_package("torchao", "torchao")
    check_modules(model, divides=True)
    if model.scheme.is_float:
        raise UserError(
            "--format transformers: fp8 is not written in this format", remedy="--format compressed-tensors"
        )
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from transformers import TorchAoConfig

    notes = list[str]()
    if model.embedding and model.embedding.has_buffers:
        # Of a module whose weight is one of torchao's tensors it fills no buffers, such as the factor of Gemma's.
        model, notes = _with_plain_embedding(model, "transformers reads no quantized one of this family")
    names, dtype = model.source.adapter.file_names(model.source.config), model.dtype

    def own_name(path: str) -> str:
        return names.get(f"{path}.weight", f"{path}.weight")

    def described() -> Iterator[tuple[str, torch.Tensor]]:
        for path, matrix in model.matrices.items():
            yield own_name(path), _torchao_tensor(matrix.scheme(model.scheme), matrix, dtype, None, None)
        for name, tensor in model.plain():
            yield names.get(name, name), torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def stored() -> Iterator[tuple[str, torch.Tensor]]:
        yield from model.plain()
        for path, matrix in model.matrices.items():
            weight = model.weight(path)
            scheme = matrix.scheme(model.scheme)
            tensor = _torchao_tensor(scheme, matrix, dtype, weight.values_NK, weight.scale_NG)
            yield from flatten_tensor_state_dict({own_name(path): tensor})[0].items()

    _, metadata = flatten_tensor_state_dict(dict(described()))
    settings = TorchAoConfig(
        _torchao_config(model.scheme),
        modules_to_not_convert=list(model.others),
        include_input_output_embeddings=model.embedding is not None,
    )
    config = model.source.config | {"quantization_config": settings.to_dict()}
    dtype_name = str(dtype).removeprefix("torch.")
    write_model_folder(folder, model.source.adapter, config, stored(), dtype=dtype_name, metadata=metadata)
    return notes


def _with_plain_embedding(model: QuantizedModel, reason: str) -> tuple[QuantizedModel, list[str]]:
    dtype_name = str(model.dtype).removeprefix("torch.")
    return model.with_plain_embedding(), [f"the token embedding has the rounded values in {dtype_name}: {reason}"]


def _torchao_config(scheme: Scheme) -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    granularity = PerGroup(scheme.group_size) if scheme.group_size else PerAxis(0)
    if scheme.inputs:
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=scheme.dtype, weight_granularity=granularity)
    return IntxWeightOnlyConfig(weight_dtype=scheme.dtype, granularity=granularity)


def _torchao_tensor(
    scheme: Scheme, matrix: Matrix, dtype: torch.dtype, values: torch.Tensor | None, scale: torch.Tensor | None
) -> Any:
    """torchao's tensor of integers; without values, one that describes it."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    group = scheme.group_size or matrix.inputs
    if values is None or scale is None:
        values = torch.empty(matrix.outputs, matrix.inputs, dtype=torch.int8, device="meta")
        scale = torch.empty(matrix.outputs, matrix.inputs // group, device="meta")
    return IntxUnpackedToInt8Tensor(
        qdata=values,
        scale=scale,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        target_dtype=scheme.dtype,
        block_size=(1, group),
        dtype=dtype,
        activation_quantization="int8_asym_per_token" if scheme.inputs else None,
    )


def write_compressed_tensors(model: QuantizedModel, folder: Path) -> list[str]:
    """Writes a folder in the format of compressed-tensors, which vLLM and transformers load.

    Integers of weights alone are packed into int32; those of `int8` are int8. The token embedding is in floating point,
    since vLLM reads no other one.

    Returns:
        Sentences on what is not stored in few bits.

    Raises:
        UserError: the package is missing, or the format cannot hold the model.
    """
    check_package("compressed-tensors", "compressed_tensors")
    check_modules(model, divides=False)
    if model.source.adapter.experts(model.source.config):
        raise UserError(
            "--format compressed-tensors: not available for blocks that were carved into experts",
            got="products with a forward of their own, which its loader replaces",
            remedy="--format transformers",
        )
    from compressed_tensors.compressors import BaseCompressor

    model, notes = _with_plain_embedding(model, "vLLM reads no quantized one") if model.embedding else (model, [])
    settings = _compressed_config(model.scheme, model.others)
    (scheme,) = settings.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(settings.format)
    names = model.source.adapter.file_names(model.source.config)

    def stored() -> Iterator[tuple[str, torch.Tensor]]:
        yield from model.plain()
        for path in model.matrices:
            weight = model.weight(path)
            # The compressor rounds (integer · scale) / scale, which gives the integer again.
            parts = compressor.compress({"weight": weight.dequantized(), "weight_scale": weight.scale_NG}, scheme)
            own = names.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight")
            yield from ((f"{own}.{name}", tensor) for name, tensor in parts.items())

    config = model.source.config | {"quantization_config": settings.model_dump(mode="json", exclude_none=True)}
    dtype_name = str(model.dtype).removeprefix("torch.")
    write_model_folder(folder, model.source.adapter, config, stored(), dtype=dtype_name)
    return notes


def _compressed_config(scheme: Scheme, others: tuple[str, ...]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    kind = "float" if scheme.is_float else "int"
    by_group = {"strategy": "group", "group_size": scheme.group_size} if scheme.group_size else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=scheme.bits, type=kind, symmetric=True, dynamic=False, **by_group)
    inputs = None
    if scheme.inputs:
        inputs = QuantizationArgs(num_bits=8, type=kind, symmetric=scheme.is_float, strategy="token", dynamic=True)
    packing = "float-quantized" if scheme.is_float else "int-quantized" if scheme.inputs else "pack-quantized"
    return QuantizationConfig(
        config_groups={
            "group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=packing)
        },
        format=packing,
        quantization_status="compressed",
        ignore=list(others),
    )
