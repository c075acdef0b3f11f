"""`--set`: how a setting is read, where it lands, and what is refused."""

from __future__ import annotations

import copy

import pytest

from cook.base.errors import UserError
from cook.config.overrides import apply_override, parse_override


@pytest.mark.parametrize(
    "text, value",
    [
        ("a=1", 1),
        ("a=1.5", 1.5),
        ("a=true", True),
        ("a=null", None),
        ('a="1"', "1"),
        ("a=results/x", "results/x"),
        ('a=["x", "y"]', ["x", "y"]),
        ('a={"b": 1}', {"b": 1}),
        ("a=", ""),
        ("a=b=c", "b=c"),
        ("a=NaN", "NaN"),
        ("a=[1", "[1"),
        ("a=" + "9" * 5000, "9" * 5000),
    ],
)
def test_values_are_json_or_else_text(text, value):
    assert parse_override(text).value == value
    assert type(parse_override(text).value) is type(value)


@pytest.mark.parametrize("text", ["", "=", "a", "=1", "a.=1", ".a=1", "a..b=1"])
def test_not_a_setting(text):
    with pytest.raises(UserError, match="not a setting"):
        parse_override(text)


def test_doubled_keys_and_deep_nesting_are_refused():
    with pytest.raises(UserError, match="appears twice"):
        parse_override('a={"b": 1, "b": 2}')
    with pytest.raises(UserError, match="nested too deeply"):
        parse_override("a=" + "[" * 200_000)


@pytest.mark.parametrize(
    "text, is_scheme", [("coarse-grained.a=1", True), ("gates.ramp=1", True), ("pruning.a=1", False), ("gate=1", False)]
)
def test_the_first_key_tells_the_file(text, is_scheme):
    assert parse_override(text).is_scheme is is_scheme


@pytest.mark.parametrize(
    "text, after, place",
    [
        ("a=5", {"a": 5}, ("a",)),
        ("n.b.c=5", {"n": {"b": {"c": 5}}}, ("n", "b", "c")),
        ("s.y.v=5", {"s": [{"name": "x"}, {"name": "y", "v": 5}]}, ("s", 1, "v")),
        ("s.1.v=5", {"s": [{"name": "x"}, {"name": "y", "v": 5}]}, ("s", 1, "v")),
        ("s.x=5", {"s": [5, {"name": "y", "v": 1}]}, ("s", 0)),
    ],
)
def test_where_a_value_lands(text, after, place):
    before = {"a": {"b": 1}, "n": None, "s": [{"name": "x"}, {"name": "y", "v": 1}]}
    root = copy.deepcopy(before)
    assert apply_override(root, parse_override(text)) == place
    assert root == before | after


@pytest.mark.parametrize(
    "text, said",
    [
        ("a.b.c=5", "'a.b' has no keys"),
        ("s.2.v=5", "an index below 2 or one of x, y"),
        ("s.-1=5", "no entry '-1'"),
        ("s.z.v=5", "no entry 'z'"),
        ("s.99999999999999999999=1", "no entry"),
        ("s.\u0663=1", "no entry"),  # a digit, but not one of ours
    ],
)
def test_places_that_do_not_exist(text, said):
    root = {"a": {"b": 1}, "s": [{"name": "x"}, {"name": "y"}]}
    with pytest.raises(UserError) as caught:
        apply_override(root, parse_override(text))
    assert said in str(caught.value) and f"--set {text}" in str(caught.value)
    assert root == {"a": {"b": 1}, "s": [{"name": "x"}, {"name": "y"}]}


def test_overrides_reach_both_files_in_order(load):
    config = load(
        "training.steps=1",
        "training.steps=2",
        "stages.pretrain.training.steps=3",
        "stages.1.training.warmup=1",
        "coarse-grained.target_sparsity=0.25",
        "gates.ramp=0.1",
        "data.text_field=body",
    )
    assert config.training.steps == 2
    assert config.stages[0].training == {"steps": 3} and config.stages[1].training == {"warmup": 1.0}
    assert config.coarse.target_sparsity == 0.25 and config.gates.ramp == 0.1
    assert config.data.text_field == "body"


def test_an_override_is_checked_like_the_file(errors_of):
    [message] = errors_of("stages.pretrain.training.step=3")
    assert message.startswith("--set stages.pretrain.training.step=3: unknown key 'stages.0.training.step'")
    assert "did you mean 'steps'?" in message


def test_a_new_section_is_blamed_on_its_override(errors_of):
    [message] = errors_of("trainin.steps=3")
    assert message.startswith("--set trainin.steps=3: unknown key 'trainin'") and "'training'" in message


def test_an_override_can_mend_the_file(load, bmcook):
    bmcook["training"]["steps"] = 0
    assert load("training.steps=4").training.steps == 4
