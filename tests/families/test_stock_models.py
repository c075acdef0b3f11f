"""A module's name before any layer was removed leads to the same block of the reshaped model."""

from __future__ import annotations

import pytest
import torch

from cook.export.pruned_folder import reshaped_source
from cook.families.source import load_model
from cook.families.stock_models import ORIGIN, own_path
from tests.tiny_families import tiny_source


def test_paths_are_translated_by_their_first_number():
    config = {ORIGIN: [0, 2, 12]}
    assert own_path(config, "model.layers.2.mlp") == "model.layers.1.mlp"
    assert own_path(config, "h.12") == "h.2" and own_path(config, "model.layers.0.x.12.y") == "model.layers.0.x.12.y"
    assert own_path(config, "model.layers.1") is None
    assert own_path(config, "model.norm2.layer_3") == "model.norm2.layer_3"
    assert own_path({}, "model.layers.7.mlp") == "model.layers.7.mlp"


def gone(*layers: int) -> dict[str, torch.Tensor]:
    return {f"layers.{layer}.{site}": torch.zeros(1) for layer in layers for site in ("att", "ffn")}


@pytest.mark.parametrize("ragged", [False, True])
def test_the_first_numbers_survive_being_reshaped_again(tmp_path, ragged):
    dense = tiny_source("llama, tied", num_hidden_layers=5)
    once = reshaped_source(dense, dense.adapter.space(dense.config), gone(1))
    assert once.config[ORIGIN] == [0, 2, 3, 4] and ORIGIN not in dense.config
    config, tensors = once.adapter.read(once.config, once.tensors)  # as from its folder
    again = {"layers.0.heads": torch.tensor([1.0, 1, 0, 0])} if ragged else {}
    space = once.adapter.space(config)
    twice = once.adapter.shrink(
        config,
        space,
        {
            **{name: () for name in gone(1)},
            **{name: tuple(mask.nonzero().flatten().tolist()) for name, mask in again.items()},
        },
    )
    assert twice.config[ORIGIN] == [0, 3, 4] and ("stock_type" in twice.config) == ragged
    same = once.adapter.shrink(twice.config, once.adapter.space(twice.config), {})
    assert same.config[ORIGIN] == [0, 3, 4]
    small = load_model(once)
    for layer in (0, 2, 3, 4):
        path = f"model.layers.{layer}.mlp.down_proj"
        own = own_path(config, path)
        assert torch.equal(small.get_submodule(own).weight, dense.tensors[f"{path}.weight"])
    assert tensors.keys() == once.tensors.keys()


def test_the_last_layers_are_missed_too():
    dense = tiny_source("gpt2, scores by layer")
    small = reshaped_source(dense, dense.adapter.space(dense.config), gone(2))
    # A layer of this family knows its own number: an empty one stays, and no layer is numbered anew.
    assert ORIGIN not in small.config
    dense = tiny_source("llama, tied")
    small = reshaped_source(dense, dense.adapter.space(dense.config), gone(2))
    assert small.config[ORIGIN] == [0, 1] and own_path(small.config, "model.layers.2") is None
