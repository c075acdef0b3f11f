"""Fake quantization: modules compute with rounded weights (and inputs), and gradients pass through the rounding.

The rounding and its gradient are torchao's. The modules stay what they are, with the same parameters under the same
names, so that ZeRO, checkpoints and masks need to know nothing of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cook.base.device import cuda_capability
from cook.base.errors import UserError
from cook.families.source import load_model
from cook.quantization.model import QuantizedModel
from cook.quantization.schemes import FLOAT8, Matrix, Scheme, scales, sharing

Rounding = Callable[[torch.Tensor], torch.Tensor]
CAPABILITY = (8, 9)
"""The oldest CUDA compute capability with FP8 units."""


def check_requirements(scheme: Scheme) -> None:
    """Checks that what the scheme needs for training is there.

    Raises:
        UserError: torchao is not installed, or no GPU has FP8 units.
    """
    if importlib.util.find_spec("torchao") is None:
        remedy = "pip install 'cook[quantization]', or pip install torchao"
        raise UserError("quantization needs the package torchao, which is not installed", remedy=remedy)
    if scheme.is_float:
        found = cuda_capability()
        if found is None or found < CAPABILITY:
            raise UserError(
                "quantization.scheme: fp8 needs a GPU with FP8 units",
                wanted="CUDA compute capability 8.9 or newer",
                got="no CUDA GPU" if found is None else ".".join(map(str, found)),
                remedy='set it to "int8" or "int4"',
            )


class FakeQuantization:
    """Fake quantization of some modules of a model, until `remove` is called."""

    def __init__(self, model: torch.nn.Module, scheme: Scheme, matrices: Mapping[str, Matrix], *, weights: bool = True):
        """Attaches it.

        Args:
            model: The model; hooks on its modules act before the rounding (inputs) or after it (outputs).
            scheme: How to round the linear modules.
            matrices: The modules, by path; with the token embedding all modules that share its weight.
            weights: False for a model whose weights are rounded already.
        """
        self._modules: list[tuple[torch.nn.Module, Any]] = []  # and a forward of its own, as products of experts have
        round_input = _input_rounding(scheme) if scheme.inputs else None
        for path, matrix in matrices.items():
            own = matrix.scheme(scheme)
            round_weight = _weight_rounding(own, matrix) if weights else None
            if not round_weight and not own.inputs:
                continue
            for module in sharing(model, path) if matrix.is_embedding else [model.get_submodule(path)]:
                self._attach(module, round_weight, round_input if own.inputs else None)

    def _attach(self, module: torch.nn.Module, round_weight: Rounding | None, round_input: Rounding | None) -> None:
        forward = module.forward

        def quantized(x: torch.Tensor, **options: Any) -> torch.Tensor:
            # Inside the forward pass, since with ZeRO-3 the weight is there only then. An attribute of the instance
            # takes precedence over the parameter of the same name.
            weight = module._parameters["weight"]
            if round_weight and weight is not None:
                module.__dict__["weight"] = round_weight(weight)
            try:
                return forward(round_input(x) if round_input else x, **options)
            finally:
                module.__dict__.pop("weight", None)

        self._modules.append((module, module.__dict__.get("forward")))
        module.forward = quantized

    def remove(self) -> None:
        """Removes it; the model is as before."""
        for module, own in self._modules:
            if own is None:
                del module.forward
            else:
                module.forward = own
        self._modules = []


def _weight_rounding(scheme: Scheme, matrix: Matrix) -> Rounding:
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    if scheme.is_float:
        round_float = _float8_rounding()
        return lambda weight: matrix.rows(round_float(matrix.rows(weight).contiguous()))
    granularity = PerGroup(scheme.group_size) if scheme.group_size else PerAxis(0)
    # "Static", since the scales are not those that it would choose.
    fake = IntxFakeQuantizer(IntxFakeQuantizeConfig(scheme.dtype, granularity, is_dynamic=False))

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        rows = matrix.rows(weight).contiguous()
        fake.scale = scales(rows, scheme)
        fake.zero_point = torch.zeros_like(fake.scale, dtype=torch.int32)
        return matrix.rows(fake(rows))

    return rounded


def _input_rounding(scheme: Scheme) -> Rounding:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    if scheme.is_float:
        return _float8_rounding()
    return IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False))


def _float8_rounding() -> Rounding:
    from torchao.quantization.qat.fake_quantize_config import Float8FakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import Float8FakeQuantizer

    return Float8FakeQuantizer(Float8FakeQuantizeConfig(FLOAT8, hp_value_lb=1e-12))


def loaded(model: QuantizedModel) -> torch.nn.Module:
    """The quantized model in floating point, in eval mode: rounded weights, and inputs that are rounded as it runs."""
    whole = load_model(model.source, dtype=None)
    for path, matrix in model.matrices.items():
        weight = whole.get_submodule(path).weight
        assert isinstance(weight, torch.nn.Parameter)
        weight.data = matrix.rows(model.weight(path).dequantized()).to(weight.dtype)
    FakeQuantization(whole, model.scheme, model.matrices, weights=False)
    return whole
