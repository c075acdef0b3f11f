"""The README's table of families is the registry's, and true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cook.families.overview import families_table
from cook.families.registry import adapters, by_config
from cook.pruning.prune import reshaped_source
from tests.tiny_families import FAMILIES, tiny_source

README = Path(__file__).resolve().parents[2] / "README.md"
PLAIN = [name for name in FAMILIES if "," not in name]


def test_the_readme_has_the_table():
    assert families_table() in README.read_text(), "replace it by what `python -m cook.families` prints"


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
