"""Guessed tables are those that were written by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import CONFIG_MAPPING

from cook.base.errors import UserError
from cook.families import decoder_tables, encoder_tables, layout, tables
from cook.families.guess import draft, drawn, guess

WRITTEN = {
    "llama": tables.LLAMA,
    "starcoder2": decoder_tables.STARCODER2,
    "phi3": tables.PHI3,
    "gemma3_text": tables.GEMMA3,
    "glm4": decoder_tables.GLM4,
    "olmo2": decoder_tables.OLMO2,
    "phi": decoder_tables.PHI,
    "stablelm": decoder_tables.STABLELM,
    "gptj": decoder_tables.GPTJ,  # but for its table of positions
    "gpt2": tables.GPT2,
    "gpt_neox": tables.GPT_NEOX,
    "mpt": decoder_tables.MPT,
    "distilbert": encoder_tables.DISTILBERT,
}
BY_HAND = {"family", "stock_heads_except", "carried"}
"""What no model shows."""


def config_of(model_type):
    return CONFIG_MAPPING[model_type]().to_dict()


@pytest.mark.parametrize("model_type", WRITTEN)
def test_a_guess_is_the_table_that_was_written_by_hand(model_type):
    written = WRITTEN[model_type]
    found = guess(config_of(model_type)).tables[-1 if written.attention.interleaved else 0]
    if written.attention.from_table:
        unknown = {"head_dim": "", "scaling": layout.Attention().scaling, "turned": "", "from_table": False}
        written = dataclasses.replace(written, attention=dataclasses.replace(written.attention, **unknown))
    for field in dataclasses.fields(written):
        if field.name not in BY_HAND:
            assert getattr(found, field.name) == getattr(written, field.name), field.name


def test_a_draft_is_python_for_the_table():
    found = guess(config_of("olmo2")).tables[0]
    assert eval(draft(found), vars(layout)) == found
    assert "norms_after=('post_attention_layernorm',)" in draft(found) and "num_hidden_layers" not in draft(found)


def test_a_fused_weight_may_have_either_order():
    sequential, interleaved = guess(config_of("persimmon")).tables
    assert (sequential.attention.interleaved, interleaved.attention.interleaved) == (False, True)
    assert sequential.attention.q == sequential.attention.v == "self_attn.query_key_value"


def test_the_tiny_model_has_the_sizes_that_the_config_has():
    found = guess(config_of("smollm3"))
    model = drawn(found.tables[0], found.config)
    assert found.tables[0].names.per_layer == ("layer_types", "no_rope_layers")
    assert len(model.model.layers) == 2 and model.model.layers[0].self_attn.k_proj.weight.shape == (64, 64)
    assert all(parameter.ne(0).any() for parameter in model.parameters())
    assert torch.equal(drawn(found.tables[0], found.config).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    "config, problem",
    [
        ({"model_type": "no_such_family"}, "no models of type 'no_such_family'"),
        ({"model_type": 3}, "no models of type 3"),
        ({"model_type": "vit"}, "no language model"),
        ({"model_type": "mamba"}, "lacks num_attention_heads"),
        ({"model_type": "mixtral"}, "mixture of experts"),
        ({"model_type": "doge"}, "attention block"),
    ],
)
def test_what_is_no_table_is_refused_in_plain_words(config, problem):
    with pytest.raises(UserError, match=problem):
        guess(config)
