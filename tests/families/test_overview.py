"""The README's table of families is the registry's, and true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cook.export.pruned_folder import mask_model, reshaped_source
from cook.families.overview import families_table
from cook.families.registry import adapters, by_config
from cook.families.source import load_model
from tests.tiny_families import FAMILIES, tiny_source

README = Path(__file__).resolve().parents[2] / "README.md"
PLAIN = [name for name in FAMILIES if "," not in name]


def test_the_readme_has_the_table():
    assert families_table() in README.read_text(), "replace it by what `cook families` prints"


def test_every_family_is_tested():
    tested = {by_config(FAMILIES[name]).family for name in PLAIN}
    assert tested == {adapter.family for adapter in adapters() if adapter.abilities.is_stock}


@pytest.mark.parametrize("name", PLAIN)
def test_the_table_is_true(name):
    source = tiny_source(name)
    adapter, space = source.adapter, source.adapter.space(source.config)
    half = {g.name: (torch.arange(g.size) < g.size // 2).float() for g in space.groups if g.kind != "layer"}
    masks = {
        "heads": {g: mask for g, mask in half.items() if g.endswith("heads")},
        "dims": {g: mask for g, mask in half.items() if g.endswith("dimff")},
        "layers": {"layers.1.att": torch.zeros(1), "layers.1.ffn": torch.zeros(1)},
        "a block": {"layers.1.att": torch.zeros(1)},
    }
    stock = {k: adapter.modeling(reshaped_source(source, space, m).config) is None for k, m in masks.items()}
    claimed = adapter.abilities
    assert stock == {"heads": claimed.stock_heads, "dims": True, "layers": claimed.stock_layers, "a block": False}
    assert (len(adapter.head_units(source.config)) == 2) == claimed.shares_keys


def test_the_exceptions_are_true():
    named = {adapter.family: adapter.abilities.stock_heads_except for adapter in adapters()}
    assert {family: text for family, text in named.items() if text} == {"Phi-3": "longrope"}
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
