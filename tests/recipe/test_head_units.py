"""Which targets of attention are accepted, and with which units."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import CONFIG_MAPPING

from cook.base.errors import UserError
from cook.config.types import FineConfig
from cook.families.registry import by_config
from cook.recipe.head_units import check_sizes, choose_head_unit, nearest_heads, reachable_heads
from tests.tiny_families import tiny_config

GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


def fine(target, unit="auto", remote=False, scope="block"):
    return FineConfig(
        train_mask=True,
        coarse_mask=None,
        num_heads=8,
        dim_ff=20,
        target_num_heads=target,
        target_dimff=20,
        heads_mask="h.pt",
        dimff_mask="d.pt",
        prune_mode="att",
        head_unit=unit,
        allow_remote_code=remote,
        scope=scope,
    )


def checked(config, section, uneven=(), one_budget=False):
    adapter = by_config(config)
    unit = choose_head_unit(adapter, config, section, uneven="heads" in uneven, one_budget=one_budget)
    check_sizes(adapter, config, adapter.space(config, unit), section, uneven)
    return unit


def config_class_takes(config, heads):
    """Some refuse a number of heads by which the hidden size cannot be divided, though `head_dim` is given."""
    fields = config | {"num_attention_heads": heads}
    try:
        CONFIG_MAPPING[fields.pop("model_type")](**fields)
    except StrictDataclassClassValidationError:
        return False
    return True


@pytest.mark.parametrize("name", GROUPED)
def test_query_heads_leave_a_single_key_value_head(name):
    config = tiny_config(name, num_key_value_heads=1)
    assert reachable_heads(by_config(config), config, "kv_group", False) == (8,)
    stock = [heads for heads in range(1, 9) if config_class_takes(config, heads)]
    assert {2, 4, 8} <= set(stock)
    assert reachable_heads(by_config(config), config, "query_head", False) == tuple(stock)
    assert reachable_heads(by_config(config), config, "query_head", True) == tuple(range(1, 9))
    assert checked(config, fine(2)) == checked(config, fine(2, "query_head")) == "query_head"
    assert checked(config, fine(3, remote=True)) == "query_head"


@pytest.mark.parametrize(
    "kv_heads, section, wanted, remedy",
    [
        (1, fine(2, "kv_group"), "8", 'set head_unit to "auto"'),
        (1, fine(3, "kv_group"), "8", 'set head_unit to "auto" and allow_remote_code to true'),
        (1, fine(2, "kv_group", remote=True), "8", 'set head_unit to "auto"'),
        (
            1,
            fine(3),
            "8 (whole key-value groups); or 1, 2, 4, 8 (the same number of query heads per group)",
            "set allow_remote_code for any of 1, 2, 3, 4, 5, 6, 7, 8",
        ),
        (
            4,
            fine(6),
            "2, 4, 8 (whole key-value groups); or 4, 8 (the same number of query heads per group)",
            "set allow_remote_code for any of 2, 4, 6, 8",
        ),
        (4, fine(2, "query_head"), "4, 8", 'set head_unit to "auto"'),
        (4, fine(6, "query_head"), "4, 8", 'set head_unit to "auto" and allow_remote_code to true'),
        (4, fine(3, remote=True), "2, 4, 6, 8 (whole key-value groups); or 4, 8 (the same number", None),
    ],
)
def test_a_refusal_names_what_would_be_taken(kv_heads, section, wanted, remedy):
    config = tiny_config("llama", num_key_value_heads=kv_heads)
    with pytest.raises(UserError) as caught:
        checked(config, section)
    text = str(caught.value)
    assert f"wanted: {wanted}" in text and f"got:    {section.target_num_heads}" in text
    assert (f"remedy: {remedy}" in text) if remedy else "remedy" not in text, text


def test_blocks_that_share_a_number_of_heads_lose_whole_groups_unless_the_scheme_says_otherwise():
    one, four = (tiny_config("llama", num_key_value_heads=n) for n in (1, 4))
    section = fine(2, remote=True, scope="global")
    assert checked(one, section, {"heads"}) == "query_head"
    assert checked(four, section, {"heads"}) == "kv_group"
    for target in (2, 3):
        assert checked(four, fine(target, "query_head", remote=True, scope="global"), {"heads"}) == "query_head"


def test_one_budget_of_parameters_chooses_query_heads_unless_the_scheme_says_otherwise():
    four, alike = tiny_config("llama", num_key_value_heads=4), tiny_config("llama", num_key_value_heads=8)
    for section in (fine(3, remote=True), fine(3, "query_head", remote=True)):
        assert checked(four, section, {"heads", "dimff"}, one_budget=True) == "query_head"
    assert checked(four, fine(3, "kv_group", remote=True), {"heads", "dimff"}, one_budget=True) == "kv_group"
    assert checked(alike, fine(3, remote=True), {"heads", "dimff"}, one_budget=True) == "kv_group"


@pytest.mark.parametrize(
    "choice, wanted, unit", [("auto", 4, "kv_group"), ("query_head", 4, "query_head"), ("kv_group", 4, "kv_group")]
)
def test_the_nearest_number_is_of_the_units_that_are_asked_for(choice, wanted, unit):
    config = tiny_config("llama", num_key_value_heads=4)
    assert nearest_heads(by_config(config), config, wanted, choice) == (unit, wanted)
    alike = tiny_config("llama", num_key_value_heads=8)
    assert nearest_heads(by_config(alike), alike, 3, choice) == ("kv_group", 3)
