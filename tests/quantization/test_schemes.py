"""Scales and rounding against numpy, and the choice of modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from cook.base.errors import UserErrors
from cook.quantization.schemes import chosen_modules, linear_modules, quantized, scheme_of, sharing
from tests.quantization.tiny_stock import SIZES


def numpy_rounded(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales, from their definition."""
    rows, inputs = weight.shape
    grouped = weight.reshape(rows, inputs // group, group)
    scale = (np.abs(grouped).max(-1) / np.float32((2**bits - 1) / 2)).astype(np.float16).astype(np.float32)
    reciprocal = np.float32(1) / scale
    integers = np.clip(np.rint(grouped * reciprocal[..., None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return integers.reshape(rows, inputs), scale


@pytest.mark.parametrize(("name", "bits", "group"), [("int8", 8, 64), ("int8_weight", 8, 64), ("int4", 4, 16)])
def test_integers_and_scales_are_those_of_numpy(name, bits, group):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    weight[3] *= 1e-4  # its scales are subnormal numbers of float16
    found = quantized(weight, scheme_of(name, 16))
    integers, scale = numpy_rounded(weight.numpy(), bits, group)
    assert np.array_equal(found.values_NK.numpy(), integers) and np.array_equal(found.scale_NG.numpy(), scale)
    assert np.abs(integers).max() >= 2 ** (bits - 1) - 1, "the range is used"
    expected = (integers.reshape(24, -1, group) * scale[..., None]).reshape(24, 64)
    assert np.array_equal(found.dequantized().numpy(), expected)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_a_row_of_zeros_stays_zero(name):
    weight = torch.zeros(2, 32)
    weight[1, 5] = 3.0
    found = quantized(weight, scheme_of(name)).dequantized()
    assert found[0].eq(0).all() and found[1, 5] == pytest.approx(3.0, rel=0.1) and found[1].count_nonzero() == 1


CLASSES = {
    LlamaConfig: LlamaForCausalLM,
    GPT2Config: GPT2LMHeadModel,
    XLMRobertaConfig: XLMRobertaForMaskedLM,
    ViTConfig: ViTForImageClassification,
}


def model_of(config) -> torch.nn.Module:
    with torch.device("meta"):
        return CLASSES[type(config)](config)


def test_all_linear_modules_are_chosen_and_nothing_that_is_an_embedding():
    model = model_of(LlamaConfig(**SIZES))
    found = chosen_modules(model, scheme_of("int8"))
    assert len(found) == 2 * 7 + 1 and "lm_head" in found
    assert found["model.layers.0.mlp.down_proj"].inputs == 64
    assert "lm_head" not in linear_modules(model_of(LlamaConfig(**SIZES, tie_word_embeddings=True)))
    gpt2 = linear_modules(
        model_of(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96, bos_token_id=1, eos_token_id=2))
    )
    assert gpt2["transformer.h.0.mlp.c_fc"].outputs == 128 and gpt2["transformer.h.0.mlp.c_fc"].is_transposed


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (LlamaConfig(**SIZES, tie_word_embeddings=True), "model.embed_tokens"),
        (LlamaConfig(**SIZES), "model.embed_tokens"),
        (
            XLMRobertaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
            "lm_head.decoder",
        ),
    ],
)
def test_the_token_embedding_is_chosen_under_the_first_name_of_its_weight(config, path):
    model, scheme = model_of(config), scheme_of("int4")
    linear, found = chosen_modules(model, scheme), chosen_modules(model, scheme, embeddings=True)
    [(own, matrix)] = found.items() - linear.items()
    assert own == path and matrix.is_embedding and not any(other.is_embedding for other in linear.values())
    assert (matrix.outputs, matrix.inputs) == (96, 32) and matrix.scheme(scheme) == scheme_of("int8_weight")
    tied = [model.get_input_embeddings(), model.get_output_embeddings()]
    assert {*sharing(model, path)} == {*tied[: 1 + config.tie_word_embeddings]}


def test_names_choose_modules_by_their_ends():
    model = model_of(LlamaConfig(**SIZES))
    found = chosen_modules(model, scheme_of("int8"), ("mlp.up_proj", "self_attn.q_proj.weight"))
    assert sorted(found) == sorted(f"model.layers.{i}.{n}" for i in (0, 1) for n in ("mlp.up_proj", "self_attn.q_proj"))
    aliases = {"proj.weight": ("mlp.up_proj.weight", "mlp.gate_proj.weight")}
    assert len(chosen_modules(model, scheme_of("int8"), ("proj",), aliases)) == 4


def test_all_mistakes_are_named_at_once():
    model = model_of(LlamaConfig(**(SIZES | {"intermediate_size": 72})))
    with pytest.raises(UserErrors) as caught:
        chosen_modules(model, scheme_of("int4"), ("mlp.up_porj", "mlp.down_proj", "norm"))
    text = str(caught.value)
    assert "did you mean 'mlp.up_proj'?" in text and "'norm'" in text
    assert "32 does not divide the inputs of 2 modules" in text and "72 inputs" in text
    with pytest.raises(UserErrors, match="embeddings: the model has no token embedding"):
        chosen_modules(
            model_of(ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4)),
            scheme_of("int8"),
            embeddings=True,
        )
