from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.export.pruned_folder import mask_model, reshaped_source
from cook.families.source import load_model
from cook.pruning import pad
from cook.pruning.pad import padded
from tests.tiny_families import tiny_source
from tests.tiny_pruning import masks_of
from tests.tiny_pruning import tiny_source as tiny_cpm_ant

NAMES = ("llama", "gemma2", "phi3", "gpt2", "opt", "bert")
SOURCES = {name: tiny_source(name) for name in NAMES}
MODELS = {name: load_model(source) for name, source in SOURCES.items()}
CASES = [(name, unit) for name, s in SOURCES.items() for unit in s.adapter.head_units(s.config)]
IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def difference(source, model, space, masks, small):
    attached = mask_model(model, space, masks)
    with torch.no_grad():
        a, b = model(input_ids=IDS).logits, load_model(small)(input_ids=IDS).logits
    attached.remove()
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_masks_give_a_stock_model_that_computes_the_same(case, data):
    source, model = SOURCES[case[0]], MODELS[case[0]]
    space = source.adapter.space(source.config, case[1])
    masks = data.draw(masks_of(space))
    filled, even = padded(source, space, masks)
    small = reshaped_source(filled, space, even)
    assert small.config["model_type"] == source.config["model_type"]
    assert difference(source, model, space, masks, small) <= 1e-5


def test_the_hidden_size_stays_as_the_mask_says_and_heads_are_padded_until_a_class_fits():
    source = SOURCES["llama"]
    space = source.adapter.space(source.config)
    masks = {f"layers.{i}.heads": torch.tensor([1.0, 1, i > 0, 0]) for i in range(3)}  # groups of 2, 4 or 6 heads
    masks |= {"hidden": (torch.arange(32) < 24).float(), "layers.1.dimff": (torch.arange(20) < 5).float()}
    filled, even = padded(source, space, masks)
    small = reshaped_source(filled, space, even)
    assert small.config["model_type"] == "llama"
    assert (small.config["hidden_size"], small.config["num_attention_heads"]) == (24, 6)
    assert difference(source, MODELS["llama"], space, masks, small) <= 1e-5
    # 21 hidden dims are no multiple of 6 or 8 heads, which Llama's config wants.
    with pytest.raises(UserError, match="no transformers class can load these sizes"):
        padded(source, space, masks | {"hidden": (torch.arange(32) < 21).float()})


def test_the_size_is_the_largest_that_a_block_keeps():
    source = SOURCES["llama"]
    space = source.adapter.space(source.config)
    masks = {f"layers.{i}.dimff": (torch.arange(20) < 5 + i).float() for i in range(3)}
    masks |= {f"layers.{i}.att": torch.zeros(1) for i in (0, 1)} | {"layers.1.ffn": torch.zeros(1)}
    masks |= {"layers.2.heads": torch.tensor([0.0, 1, 1, 0])}
    filled, even = padded(source, space, masks)
    config = reshaped_source(filled, space, even).config
    assert config["num_hidden_layers"] == 2  # layer 1 is gone whole
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (7, 4, 2)
    assert even["layers.2.heads"].tolist() == [0, 1, 1, 0] and even["layers.0.heads"].tolist() == [1, 1, 0, 0]


def test_sizes_that_the_class_refuses_are_padded_on():
    source = SOURCES["llama"]  # 32 features are not divisible by 6 heads
    space = source.adapter.space(source.config)
    masks = {"layers.0.heads": torch.tensor([1.0, 1, 1, 0]), "layers.1.heads": torch.tensor([1.0, 0, 0, 0])}
    masks |= {"layers.2.heads": torch.tensor([1.0, 1, 0, 0])}
    filled, even = padded(source, space, masks)
    assert reshaped_source(filled, space, even).config["num_attention_heads"] == 8


def test_without_the_zeros_it_is_another_model(monkeypatch):
    source, model = SOURCES["llama"], MODELS["llama"]
    space = source.adapter.space(source.config)
    masks = {"layers.0.dimff": (torch.arange(20) < 5).float(), "layers.1.att": torch.zeros(1)}
    monkeypatch.setattr(pad, "_read", lambda tensors, path, zeroed, is_empty: tensors[path])
    filled, even = padded(source, space, masks)
    assert difference(source, model, space, masks, reshaped_source(filled, space, even)) > 0.01


def test_what_cannot_be_padded(tmp_path):
    source = SOURCES["llama"]
    space = source.adapter.space(source.config)
    gone = reshaped_source(source, space, {"layers.1.att": torch.zeros(1)})
    with pytest.raises(UserError, match="already lacks blocks"):
        padded(gone, gone.adapter.space(gone.config), {})
    _, own = tiny_cpm_ant(tmp_path)
    with pytest.raises(UserError, match="always needs its modeling file"):
        padded(own, own.adapter.space(own.config), {})
    refuses = dataclasses.replace(source, adapter=dataclasses.replace(source.adapter, stock_holds=lambda *_: False))
    with pytest.raises(UserError, match="no transformers class"):
        padded(refuses, space, {})
