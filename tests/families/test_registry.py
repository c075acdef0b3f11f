"""Configs find their adapters; the documentation's table of families is the registry's, and true."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cook.base.errors import UserError
from cook.export.pruned_folder import mask_model, reshaped_source
from cook.families import registry
from cook.families.registry import adapters, by_config, families_table, family_facts, knows, register, unregister
from cook.families.source import load_model
from tests.families.test_images import CONFIGS as WITH_IMAGES
from tests.tiny_families import FAMILIES, MOE, MORE, MORE_ENCODERS, tiny_source

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how_to" / "families.md"
EVERY = FAMILIES | MOE | MORE | MORE_ENCODERS
PLAIN = [name for name in EVERY if "," not in name]


def test_configs_find_their_adapter():
    for adapter in adapters():
        for model_type in adapter.model_types:
            assert by_config({"model_type": model_type}) is adapter
            assert by_config({"model_type": "cook_ragged", "stock_type": model_type}) is adapter
    assert by_config({"num_layers": 3}).family == "CPM-Ant"  # CPM-Live's JSON has no such field
    claimed = [t for adapter in adapters() for t in adapter.model_types]
    assert len(claimed) == len(set(claimed))


@pytest.mark.parametrize("model_type", ["no_such_family", "", 3, ["cpmant"]])
def test_an_unknown_type_is_refused_with_the_known_ones_and_what_an_adapter_needs(model_type):
    assert not knows({"model_type": model_type})
    with pytest.raises(UserError, match="no adapter") as caught:
        by_config({"model_type": model_type})
    assert {"cook_cpm_ant", "cpmant", "llama"} <= set(caught.value.wanted.split(", "))
    assert "registry.register" in caught.value.remedy and "Family" in caught.value.remedy


def test_a_family_from_outside():
    types = frozenset({"mine", "llama"})
    own = dataclasses.replace(by_config({"model_type": "llama"}), family="Mine", model_types=types)
    register(own)
    try:
        assert by_config({"model_type": "mine"}) is own and by_config({"model_type": "llama"}) is own
    finally:
        unregister(own)
    assert by_config({"model_type": "llama"}).family == "Llama, SmolLM2" and registry._added == []


def test_the_page_has_the_table():
    assert families_table() in PAGE.read_text(), "run python docs/generate.py"


def test_every_family_is_tested():
    tested = {by_config(EVERY[name]).family for name in PLAIN}
    tested |= {by_config({"model_type": name}).family for name in WITH_IMAGES}
    assert tested == {adapter.family for adapter in adapters() if adapter.abilities.is_stock}


@pytest.mark.parametrize("name", PLAIN)
def test_the_table_is_true(name):
    source = tiny_source(name)
    adapter, space = source.adapter, source.adapter.space(source.config)
    claimed = adapter.abilities
    inner = [group for group in space.groups if group.kind != "layer"]
    half = {g.name: torch.cat([(torch.arange(n) < n // 2).float() for n in g.spans]) for g in inner}
    masks = {
        "heads": {g: mask for g, mask in half.items() if g.endswith("heads")},
        "dims": {g: mask for g, mask in half.items() if g.endswith("dimff")},
        "experts": {g: mask for g, mask in half.items() if g.endswith("experts")},
        "layers": {"layers.1.att": torch.zeros(1), "layers.1.ffn": torch.zeros(1)},
        "a block": {"layers.1.att": torch.zeros(1)},
    }
    if claimed.experts:
        masks["experts"] = {g: mask for g, mask in half.items() if g.endswith("experts")}
    facts = next(facts for facts in family_facts() if facts["family"] == adapter.family)
    assert (space.head_dims is not None) == (facts["fewer_head_dims"] != "no")
    if facts["fewer_head_dims"] == "stock":
        masks["head dims"] = {"head_dims": (torch.arange(space.head_dims.size) < 2).float()}
    stock = {k: adapter.modeling(reshaped_source(source, space, m).config) is None for k, m in masks.items()}
    assert stock == {
        "heads": claimed.stock_heads,
        "dims": claimed.stock_dims,
        "layers": claimed.stock_layers,
        "a block": False,
        **dict.fromkeys({"experts", "head dims"} & {*masks}, True),
    }
    assert (len(adapter.head_units(source.config)) == 2) == claimed.shares_keys


def test_the_exceptions_are_true():
    named = {adapter.family: adapter.abilities.stock_heads_except for adapter in adapters()}
    assert {family: text for family, text in named.items() if text} == {"Phi-3": "longrope", "Phi": "qk_layernorm"}
    factors = {"short_factor": [1.0, 1.1], "long_factor": [1.5, 2.0], "factor": 2.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **factors}
    sizes = {"head_dim": 4, "original_max_position_embeddings": 32}
    for own in (rope, {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}):
        source = tiny_source("phi3", rope_parameters=own, **sizes)
        space = source.adapter.space(source.config)
        masks = {g.name: (torch.arange(g.size) < g.size // 2).float() for g in space.of("heads")}
        small = reshaped_source(source, space, masks)
        assert (source.adapter.modeling(small.config) is not None) == (own is rope)
        model, reshaped = load_model(source), load_model(small)
        mask_model(model, space, masks)
        for length in (9, 40):  # within the original positions, and beyond them
            ids = torch.randint(3, 61, (2, length), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                a, b = model(input_ids=ids).logits, reshaped(input_ids=ids).logits
            assert float((a - b).abs().max() / a.abs().max()) <= 1e-5
