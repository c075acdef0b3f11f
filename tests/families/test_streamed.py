"""A streamed model computes what the whole one does, with the weights of one layer in memory at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from transformers import BertConfig, GPT2Config, LlamaConfig

from cook.base.errors import UserError
from cook.base.tensor_files import LazyTensors
from cook.export.pruned_folder import mask_model, reshaped_source
from cook.families.source import load_model, open_model, unfilled_model
from cook.families.streamed import fits_into_memory, model_bytes, streamed_model
from tests.tiny_families import tiny_source
from tests.tiny_pruning import random_masks

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=20, vocab_size=61)
CONFIGS = {
    "LlamaForCausalLM": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "GPT2LMHeadModel": GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=30, vocab_size=61),
    "BertForMaskedLM": BertConfig(**SIZES, max_position_embeddings=40),
}
IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_folder_of_transformers_gives_the_same_logits(tmp_path, name):
    made = getattr(transformers, name)
    torch.manual_seed(0)
    made(CONFIGS[name]).save_pretrained(tmp_path)
    wanted = made.from_pretrained(tmp_path).eval()(IDS).logits
    model = streamed_model(open_model(tmp_path), torch.float32)
    assert torch.equal(model(IDS).logits, wanted) and torch.equal(model(IDS).logits, wanted)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi3", "gpt_neox", "opt"])
@torch.no_grad()
def test_masks_apply_as_to_the_whole_model(name):
    source = tiny_source(name)
    space = source.adapter.space(source.config)
    masks = random_masks(space, 1)
    whole, streamed = load_model(source), streamed_model(source, torch.float64)
    for model in (whole.double(), streamed):
        mask_model(model, space, masks)
    # The buffers of `whole` (frequencies of the positions) were rounded to fp32 before.
    apart = (streamed(IDS).logits - whole(IDS).logits).abs().max()
    assert apart <= 1e-5 * whole(IDS).logits.abs().max()


@torch.no_grad()
def test_every_weight_is_read_once_per_pass_and_one_layer_is_in_memory():
    source = tiny_source("llama")
    read: list[str] = []
    readers = {n: lambda n=n: read.append(n) or source.tensors[n].clone() for n in source.tensors}
    model = streamed_model(replace(source, tensors=LazyTensors(readers)), torch.float32)

    def present():
        return {n.split(".")[2] for n, p in model.named_parameters() if ".layers." in n and all(p.stride())}

    inside: list[set[str]] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: inside.append(present()))
    read.clear()
    model(IDS)
    assert inside == [{"0"}, {"1"}, {"2"}] and present() == set()
    assert sorted(read) == sorted(n for n in source.tensors if ".layers." in n)
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in source.tensors.values())


def test_weights_of_another_model_are_refused():
    source = tiny_source("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    others = {n: t for n, t in source.tensors.items() if n != name}
    with pytest.raises(UserError, match=f"{name}' is missing"):
        streamed_model(replace(source, tensors=others), None)
    model = streamed_model(replace(source, tensors={**others, name: torch.zeros(3, 32)}), None)
    with pytest.raises(UserError, match="do not fit"), torch.no_grad():
        model(IDS)


def test_a_model_fits_if_its_bytes_do(monkeypatch):
    source = tiny_source("llama")
    count = sum(t.numel() for t in source.tensors.values())
    assert model_bytes(source, torch.bfloat16) == 2 * count and model_bytes(source, None) == 4 * count
    for free, fits in ((4 * count, False), (6 * count, True)):
        monkeypatch.setattr("cook.families.streamed.free_memory", lambda device, free=free: free)
        assert fits_into_memory(source, torch.float32) is fits


def test_a_reshaped_model_is_built_without_drawing_weights(monkeypatch):
    """Else they would take the memory of the whole model."""
    whole = tiny_source("llama")
    space = whole.adapter.space(whole.config)
    small = reshaped_source(whole, space, random_masks(space, 0, blocks=0.9))
    assert small.config["model_type"] == "cook_ragged"
    drawn = []
    made = type(small.adapter.build(small.config))
    monkeypatch.setattr(made, "_init_weights", lambda self, module: drawn.append(type(module)))
    small.adapter.build(small.config)
    assert torch.nn.Linear in drawn  # as transformers does it
    drawn.clear()
    unfilled_model(small.adapter, small.config)
    assert not drawn
