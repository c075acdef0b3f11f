"""What is read off a model's description, and that an unknown description is no error."""

from __future__ import annotations

import json

import pytest
from transformers import Qwen3MoeConfig

from cook.base.errors import UserError
from cook.config.facts import ModelFacts, model_facts
from cook.config.types import ModelConfig


def facts_of(config):
    return model_facts(ModelConfig(type="cpm_ant", config=config))


def test_plain_configuration():
    config = {"vocab_size": 9, "prompt_length": 4, "num_heads": 16, "dim_ff": 700}
    expected = ModelFacts(vocab_size=9, prompt_length=4, num_heads=16, dim_ff=700, layers_removed=False)
    assert facts_of(config) == expected


@pytest.mark.parametrize(
    "mask_modules, removed",
    [
        (None, False),
        ([[False, False]], False),
        ([[False, False], [False, True]], True),
        ([True, False], True),
        ("yes", None),
    ],
)
def test_removed_layers(mask_modules, removed):
    assert facts_of({"mask_modules": mask_modules}).layers_removed is removed


def test_a_ragged_model_has_the_size_of_its_blocks_not_the_plain_field():
    ragged = {"num_heads": 16, "dim_ff": 700, "layer_heads": [[0, 5], [], [3, 1]], "layer_dim_ff": [0, 350, 350]}
    assert (facts_of(ragged).num_heads, facts_of(ragged).dim_ff) == (2, 350)
    uneven = {"num_heads": 16, "dim_ff": 700, "layer_heads": [[0, 5], [3]], "layer_dim_ff": [10, 350]}
    assert (facts_of(uneven).num_heads, facts_of(uneven).dim_ff) == (None, None)


@pytest.mark.parametrize("strange", [{}, {"num_heads": True, "dim_ff": "7", "layer_heads": 3, "mask_modules": 1}])
def test_strange_descriptions_say_nothing(strange):
    facts = facts_of(strange)
    assert (facts.num_heads, facts.dim_ff, facts.vocab_size) == (None, None, None)


def test_a_folder_speaks_for_itself(elsewhere):
    (elsewhere / "config.json").write_text(json.dumps({"num_attention_heads": 32, "mask_modules": [[True, False]]}))
    facts = model_facts(ModelConfig(type="cpm_ant", path=str(elsewhere)))
    assert facts.num_heads == 32 and facts.layers_removed is True
    assert model_facts(ModelConfig(type="cpm_ant", path=str(elsewhere / "none"))) == ModelFacts()


@pytest.mark.parametrize("content, fits", [("[]", True), ("{", False), ("9" * 5000, False)])
def test_an_unreadable_folder(elsewhere, content, fits):
    (elsewhere / "config.json").write_text(content)
    model = ModelConfig(type="cpm_ant", path=str(elsewhere))
    if fits:
        assert model_facts(model) == ModelFacts()
    else:
        with pytest.raises(UserError, match="config.json"):
            model_facts(model)


def test_a_ragged_export_tells_no_sizes_that_its_layers_do_not_share(elsewhere):
    fields = {"vocab_size": 61, "num_attention_heads": 8, "intermediate_size": 20}
    (elsewhere / "config.json").write_text(json.dumps({**fields, "model_type": "cook_ragged", "stock_type": "llama"}))
    assert model_facts(ModelConfig(type="hf", path=str(elsewhere))) == ModelFacts(vocab_size=61, max_positions=2048)
    (elsewhere / "config.json").write_text(json.dumps(fields))
    facts = model_facts(ModelConfig(type="hf", path=str(elsewhere)))
    assert (facts.num_heads, facts.dim_ff, facts.layers_removed) == (8, 20, None)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"model_type": "gpt2", "n_positions": 32}, 32),
        ({"model_type": "gpt2"}, 1024),
        ({"model_type": "llama", "max_position_embeddings": 32}, 32),
        ({"model_type": "opt", "max_position_embeddings": 48}, 48),
        ({"model_type": "gpt_neox"}, 2048),
        ({"model_type": "cook_ragged", "stock_type": "gpt2", "n_positions": 32}, 32),
        ({"model_type": "gpt2", "n_positions": "x"}, None),
        ({"model_type": "none"}, None),
    ],
)
def test_every_family_says_how_many_positions_it_has(elsewhere, config, positions):
    (elsewhere / "config.json").write_text(json.dumps(config))
    assert model_facts(ModelConfig(type="hf", path=str(elsewhere))).max_positions == positions


def test_a_model_whose_experts_have_a_size_of_their_own_has_no_size_of_all_blocks(elsewhere):
    Qwen3MoeConfig(intermediate_size=48, moe_intermediate_size=16, num_attention_heads=4).save_pretrained(elsewhere)
    facts = model_facts(ModelConfig(type="hf", path=str(elsewhere)))
    assert (facts.num_heads, facts.dim_ff) == (4, None)


def test_heads_under_the_name_of_the_family(elsewhere):
    (elsewhere / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 4, "n_embd": 32}))
    assert model_facts(ModelConfig(type="hf", path=str(elsewhere))).num_heads == 4
