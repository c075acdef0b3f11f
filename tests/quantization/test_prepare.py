"""Fake quantization against numpy, on the modules of three kinds; what is there afterwards; missing requirements."""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from cook.base.errors import UserError
from cook.models.cpm_ant import Embedding, Linear
from cook.quantization import prepare
from cook.quantization.schemes import Matrix, linear_modules, quantized, scheme_of, token_embedding
from tests.models.cpm_ant_tiny import tiny_config
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
    own, conv = Linear(64, 24, fan_in=100), Conv1D(24, 64)
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


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_token_embedding_is_rounded_to_8_bits_where_it_is_used(name, is_tied):
    """Against a stock model whose table holds rounded numbers, and whose other modules are rounded here."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=is_tied, initializer_range=0.2))
    reference = copy.deepcopy(model)
    linear, table = linear_modules(model), token_embedding(model)
    prepare.FakeQuantization(model, scheme_of(name), linear | table)
    weight = reference.model.embed_tokens.weight
    weight.data = torch.from_numpy(rounded_rows(weight.detach().numpy()))
    fake = prepare.FakeQuantization(reference, scheme_of(name), linear)
    # The same numbers in the same operations.
    assert torch.equal(model(IDS).logits, reference(IDS).logits)
    model(IDS, labels=IDS).loss.backward()
    reference(IDS, labels=IDS).loss.backward()
    own, wanted = model.model.embed_tokens.weight, reference.model.embed_tokens.weight.grad
    # Weights that the range of integers cuts off have no gradient: those half a step from its ends.
    inside = quantized(own, scheme_of("int8_weight")).values_NK.int().abs() < 127
    # The gradient is multiplied by the scale and by its reciprocal.
    assert torch.allclose(own.grad[inside], wanted[inside], rtol=1e-5) and wanted[IDS[0, 0]].count_nonzero() > 20
    fake.remove()
    assert (model.lm_head.weight is own) == is_tied


def rounded_rows(table: np.ndarray) -> np.ndarray:
    """8 bits with a float16 scale per row, and back; from the definition."""
    scale = (np.abs(table).max(-1, keepdims=True) / np.float32(127.5)).astype(np.float16).astype(np.float32)
    return np.clip(np.rint(table * (np.float32(1) / scale)), -128, 127) * scale


def test_the_table_of_cpm_ant_is_rounded_for_ids_and_for_scores():
    torch.manual_seed(0)
    config = tiny_config(dim_model=24)
    config.unpruned = config.sizes_before() | {"dim_model": 36}
    model = torch.nn.ModuleDict({"table": Embedding(30, config)})
    table = model["table"]
    matrix = Matrix(outputs=30, inputs=24, divides=True, is_embedding=True)
    prepare.FakeQuantization(model, scheme_of("int8"), {"table": matrix})
    rounded = rounded_rows(table.weight.detach().numpy()).astype(np.float64)
    ids, hidden = torch.arange(30), torch.randn(5, 24)
    # fp32 rounding of the factor 1/6 and of sums of 24 products.
    assert np.abs(table(ids).detach().numpy() - rounded / 6).max() < 1e-6
    scores = table(hidden, project=True).detach().numpy()
    assert np.abs(scores - hidden.double().numpy() @ rounded.T / 6).max() < 1e-5
