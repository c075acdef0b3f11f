"""Folders of models with experts: stock classes of transformers load them, or the modeling file does."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import cook
from cook.base.errors import UserError
from cook.export.experts_folder import write_experts
from cook.export.model_folder import write_model_folder
from cook.export.pruned_folder import prune_to_folder
from cook.families.source import load_model, open_model
from tests.tiny_experts import random_carvings, with_experts

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SCALED = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 8}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=SCALED)),
    "llama, tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "biases": (LlamaForCausalLM, LlamaConfig(**SIZES, mlp_bias=True)),
}
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""Sums in another order, in fp32."""


def saved(folder, name, **experts):
    """A folder that transformers saved, then the same model with random experts, as a stage writes it."""
    made, config = MODELS[name]
    torch.manual_seed(0)
    model = made(config)
    for weight in model.parameters():
        weight.data = weight.data + 0.1 * torch.randn_like(weight)  # biases and norms matter too
    model.save_pretrained(folder / "dense")
    source = open_model(folder / "dense")
    source = with_experts(source, random_carvings(source, **experts))
    write_model_folder(folder / "stage", source.adapter, source.config, source.tensors.items())
    return open_model(folder / "stage")


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen2", "qwen3"])
def test_a_stock_class_holds_models_with_one_routed_expert_per_token(tmp_path, name):
    source = saved(tmp_path, name, experts=8, shared=3, active=0.5)
    written = write_experts(source, source.adapter.space(source.config), tmp_path / "stock")
    assert not written.needs_remote_code and written.auto_class == "AutoModelForCausalLM"
    config = json.loads((tmp_path / "stock/config.json").read_text())
    sizes = {"n_routed_experts": 5, "n_shared_experts": 3, "moe_intermediate_size": 8, "num_experts_per_tok": 1}
    assert config["model_type"] == "glm4_moe" and sizes.items() <= config.items()
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits_of(model), logits_of(load_model(source)), **ROUNDING)
    cached = model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert cached.shape == (2, 11)


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("llama", {"experts": 8, "shared": 2, "active": 0.5}),  # two routed experts, which a stock class would weigh
        ("llama", {"experts": 7, "shared": 1, "active": 0.3}),  # 64 dims do not divide evenly
        ("biases", {"experts": 8, "shared": 3, "active": 0.5}),
    ],
)
def test_other_models_keep_their_modeling_file(tmp_path, name, experts):
    source = saved(tmp_path, name, **experts)
    written = write_experts(source, source.adapter.space(source.config), tmp_path / "carried")
    assert written.needs_remote_code and {"modeling_cook_ragged.py", "cook_experts.py"} <= {
        path.name for path in written.folder.iterdir()
    }
    got, wanted = logits_of(load_model(open_model(written.folder))), logits_of(load_model(source))
    # fp32: where weights lie in memory, products sum in another order.
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_weight_that_would_be_lost_is_refused(tmp_path):
    saved(tmp_path, "llama", experts=8, shared=3, active=0.5)
    file = tmp_path / "stage/model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.router.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="router.bias' is missing"):
        open_model(tmp_path / "stage")


def test_a_model_with_experts_cannot_be_cut(tmp_path):
    source = saved(tmp_path, "llama")
    space = source.adapter.space(source.config)
    with pytest.raises(UserError, match="carved into experts, which cannot be cut"):
        prune_to_folder(source, space, {"layers.0.heads": torch.tensor([1.0, 0.0])}, tmp_path / "small")
    with pytest.raises(UserError, match="carved into experts, which cannot be cut"):
        cook.plan(load_model(source), keep={"dims": 0.5})
