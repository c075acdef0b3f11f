"""Query heads that share keys and values, by any number of them, against stock models with zeroed weights."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from cook.export.pruned_folder import open_masks, prune_to_folder
from cook.families.source import open_model
from cook.pruning.counts import parameters, unit_parameters
from cook.pruning.mask_set import kept_counts
from cook.pruning.pad import padded
from tests.tiny_families import tiny_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
HEADS, LAYERS = 8, 3
IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
EVEN, UNEVEN = (4, 4, 4), (2, 4, 4)
"""Query heads that each layer keeps."""


def stock_model(name, kv_heads):
    """A model that transformers builds itself, every weight drawn."""
    fields = tiny_config(name, num_key_value_heads=kv_heads)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[fields.pop("model_type")](**fields), dtype=torch.float32)
    generator = torch.Generator().manual_seed(kv_heads)
    for path, weight in model.named_parameters():
        drawn = 0.3 * torch.randn(weight.shape, generator=generator)
        weight.data = drawn + (1.0 if weight.ndim == 1 and path.endswith(".weight") else 0.0)
    return model.eval()


def head_masks(kv_heads, kept):
    """As many query heads of every key-value group, other ones in every layer and group; all in a row per layer."""
    per_group = HEADS // kv_heads
    rows = torch.zeros(LAYERS, kv_heads, per_group)
    for layer, number in enumerate(kept):
        for group in range(kv_heads):
            rows[layer, group, (torch.arange(number // kv_heads) + layer + group) % per_group] = 1
    return rows.reshape(LAYERS, HEADS)


def whole_group_masks(kv_heads, kept):
    """Whole key-value groups, other ones in every layer."""
    rows = torch.zeros(LAYERS, kv_heads, HEADS // kv_heads)
    for layer, number in enumerate(kept):
        rows[layer, (torch.arange(number * kv_heads // HEADS) + layer) % kv_heads] = 1
    return rows.reshape(LAYERS, HEADS)


def zeroed(model, rows):
    """The model itself, nothing of the heads that are masked coming through the attention's last product."""
    for layer, row in zip(model.model.layers, rows, strict=True):
        out = layer.self_attn.o_proj.weight
        out.data *= row.repeat_interleave(out.shape[1] // HEADS)
    return model


ANY = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 1, 0, 0]]).float()
"""Query heads with other numbers in every key-value group, of 2 or 4; a group of the second layer is gone."""


@pytest.mark.parametrize("kind", ["uniform", "ragged"])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_query_heads_are_removed_exactly(tmp_path, name, kv_heads, kind):
    model = stock_model(name, kv_heads)
    model.save_pretrained(tmp_path / "model")
    torch.save({"heads_z": ANY}, tmp_path / "heads.pt")
    source = open_model(tmp_path / "model")
    space, masks = open_masks(source, heads=str(tmp_path / "heads.pt"))
    if kind == "uniform":
        source, masks = padded(source, space, masks)
    pruned = prune_to_folder(source, space, masks, tmp_path / "small")
    assert pruned.needs_remote_code == (kind == "ragged")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=kind == "ragged")
    with torch.no_grad():
        expected, logits = zeroed(model, ANY)(input_ids=IDS).logits, small(input_ids=IDS).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-5
    left = sum(p.numel() for p in small.parameters())
    assert left == parameters(space, kept_counts(masks)) and left <= sum(p.numel() for p in model.parameters())
    if kind == "ragged":
        per_group = ANY.view(LAYERS, kv_heads, -1).sum(2)
        assert left == parameters(space) - _per_head(space) * int((ANY == 0).sum()) - _per_key(space) * int(
            (per_group == 0).sum()
        )


def _per_head(space):
    return unit_parameters(space, space.of("heads")[0])


def _per_key(space):
    return unit_parameters(space, space.of("keys")[0])


@pytest.mark.parametrize("kind", ["stock", "uniform", "ragged"])
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("name", FAMILIES)
def test_heads_are_removed_exactly(tmp_path, name, kv_heads, kind):
    model = stock_model(name, kv_heads)
    model.save_pretrained(tmp_path / "model")
    kept = EVEN if kind == "stock" else UNEVEN
    rows = whole_group_masks(kv_heads, kept) if kv_heads == HEADS else head_masks(kv_heads, kept)
    torch.save({"heads_z": rows}, tmp_path / "heads.pt")
    source = open_model(tmp_path / "model")
    space, masks = open_masks(source, heads=str(tmp_path / "heads.pt"))
    if kind == "uniform":
        source, masks = padded(source, space, masks)
    pruned = prune_to_folder(source, space, masks, tmp_path / "small")

    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert pruned.needs_remote_code == ("auto_map" in config) == (kind == "ragged")
    if kind != "ragged":
        kv_left = 4 if kv_heads == HEADS else kv_heads
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, kv_left)
        assert config["head_dim"] == source.config["head_dim"]
    small, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", trust_remote_code=kind == "ragged", output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        expected, logits = zeroed(model, rows)(input_ids=IDS).logits, small(input_ids=IDS).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_unit_says_what_it_is(tmp_path, name, kv_heads):
    stock_model(name, kv_heads).save_pretrained(tmp_path)
    source = open_model(tmp_path)
    units = source.adapter.head_units(source.config)
    assert units == (("kv_group",) if kv_heads == HEADS else ("kv_group", "query_head"))
    for unit in units:
        for group in source.adapter.space(source.config, unit).of("heads"):
            assert group.head_unit == unit
            assert group.heads(group.size) == (HEADS, kv_heads)
            less = (HEADS - HEADS // kv_heads, kv_heads - 1) if unit == "kv_group" else (HEADS - kv_heads, kv_heads)
            assert group.heads(group.size - group.sections) == less
