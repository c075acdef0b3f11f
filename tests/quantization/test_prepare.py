"""Fake quantization against numpy, on the modules of three kinds; what is there afterwards; missing requirements."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from cook.base.errors import UserError
from cook.models.cpm_ant import Linear
from cook.quantization import prepare
from cook.quantization.schemes import linear_modules, quantized, scheme_of
from tests.quantization.tiny_stock import IDS, SIZES

pytest.importorskip("torchao")
SCHEMES = ("int8", "int8_weight", "int4")


def rounded_inputs(x: np.ndarray) -> np.ndarray:
    """Inputs as int8 with a scale and a zero point per token, and back; from the definition."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = ((high - low) / np.float32(255)).astype(np.float32)
    zero = np.clip(-128 - np.rint(low / scale), -128, 127)
    return (np.clip(np.rint(x * (np.float32(1) / scale)) + zero, -128, 127) - zero) * scale


def modules() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    # 100: this one is part of a model whose other units are removed, and divides by the root of the whole size.
    own, conv = Linear(64, 24), Conv1D(24, 64)
    own.fan_in = 100
    return {"linear": torch.nn.Linear(64, 24), "conv": conv, "own": own}


@pytest.mark.parametrize("kind", ["linear", "conv", "own"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_module_computes_with_the_rounded_weight(kind, name):
    scheme, model = scheme_of(name), torch.nn.ModuleDict(modules())
    module = model[kind]
    prepare.FakeQuantization(model, scheme, linear_modules(model))
    x = torch.randn(3, 5, 64)
    rows = module.weight.t() if kind == "conv" else module.weight
    weight = quantized(rows, scheme).dequantized().double().numpy()
    seen = rounded_inputs(x.numpy()) if scheme.inputs else x.numpy()
    wanted = seen.astype(np.float64) @ weight.T
    wanted = wanted / 10 if kind == "own" else wanted + module.bias.detach().numpy()
    # fp32 sums of 64 products of order 1; a wrong integer would give 1e-2.
    assert np.abs(module(x).detach().numpy() - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_gradients_pass_through_the_rounding():
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(64, 24)})
    linear, x = model["linear"], torch.randn(7, 64)
    prepare.FakeQuantization(model, scheme_of("int4"), linear_modules(model))
    linear(x).sum().backward()
    inside = quantized(linear.weight, scheme_of("int4")).values_NK.abs() < 7  # at the ends the rounding clips
    assert inside.sum() > 500
    assert torch.allclose(linear.weight.grad[inside], x.sum(0).expand(24, 64)[inside], rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_after_its_removal_the_model_is_as_before(name):
    torch.manual_seed(0)
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    model = (
        LlamaForCausalLM(LlamaConfig(**SIZES))
        if name == "llama"
        else GPT2LMHeadModel(GPT2Config(**small, bos_token_id=1, eos_token_id=2))
    )
    names, before = list(model.state_dict()), model.eval()(IDS).logits
    fake = prepare.FakeQuantization(model, scheme_of("int8"), linear_modules(model))
    apart = float(((model(IDS).logits - before).abs().max() / before.abs().max()).detach())
    assert 1e-4 < apart < 0.1 and list(model.state_dict()) == names
    fake.remove()
    assert torch.equal(model(IDS).logits, before)


def test_gates_act_before_the_inputs_are_rounded():
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(64, 24)})
    z = torch.cat([torch.ones(32), torch.zeros(32)])
    model["linear"].register_forward_pre_hook(lambda _module, inputs: (inputs[0] * z,))
    prepare.FakeQuantization(model, scheme_of("int8"), linear_modules(model))
    x = torch.randn(5, 64)
    large = x + 100 * (1 - z)  # a value behind a closed gate must not widen the range of its token
    assert torch.equal(model["linear"](x), model["linear"](large))


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="fp8 needs a GPU with FP8 units"):
        prepare.check_requirements(scheme_of("fp8"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package torchao") as caught:
        prepare.check_requirements(scheme_of("int8"))
    assert "pip install" in str(caught.value)
