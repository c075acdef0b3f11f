"""The schemas themselves, and the messages about values that violate them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import jsonschema
import pytest

from cook.config import types
from cook.config.__main__ import generated
from cook.config.declare import KeysOf, Size, UserPath, object_schema
from cook.config.schema import MAX_DEPTH, load_schema, schema_findings, shown, subschema, wanted


def described_keys(node, place=()):
    """Every key that a schema names, with its subschema."""
    for key, below in node.get("properties", {}).items():
        yield (*place, key), below
        yield from described_keys(below, (*place, key))
    if isinstance(node.get("items"), dict):
        yield from described_keys(node["items"], (*place, 0))


@pytest.mark.parametrize("path", generated(), ids=lambda path: path.name)
def test_the_committed_files_are_those_that_the_dataclasses_make(path):
    assert path.read_text(encoding="utf-8") == generated()[path], "run python -m cook.config"


@pytest.mark.parametrize("name", ["bmcook", "l0_pruning", "tasks"])
def test_schemas_are_valid_and_describe_every_key(name):
    schema = load_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    keys = list(described_keys(schema))
    assert len(keys) > 15
    for place, node in keys:
        assert node.get("description", "").endswith(".") or place[0] == "deepspeed", place


def test_the_reference_page_has_every_key():
    [page] = [text for path, text in generated().items() if path.suffix == ".md"]
    for name in ("bmcook", "l0_pruning", "tasks"):
        for place, _ in described_keys(load_schema(name)):
            assert place[0] == "deepspeed" and len(place) > 1 or f"| `{place[-1]}` |" in page, place


@pytest.mark.parametrize("name", ["bmcook", "l0_pruning"])
def test_all_objects_but_deepspeeds_refuse_unknown_keys(name):
    for place, node in described_keys(load_schema(name)):
        if "properties" in node and place[0] != "deepspeed":
            assert node["additionalProperties"] is False, place


@dataclass(frozen=True, kw_only=True)
class Inner:
    number: Size
    """A number.

    None of it is in another line."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: Literal["a", "b"] | None = None
    """True: a name."""
    pair: tuple[int, float] = (1, 2)
    """A pair."""
    path: UserPath | None = None
    """A path."""
    inner: Inner | None = None
    """Another."""
    partial: Annotated[dict[str, Any], KeysOf(Inner, complete=False)] = field(default_factory=dict)
    """Some of its keys."""
    losses: dict[str, float]
    """By name."""
    derived: int = 0


def test_kinds_become_keywords():
    assert object_schema(Outer) == {
        "type": "object",
        "additionalProperties": False,
        "required": ["losses"],
        "properties": {
            "name": {"description": "true: a name.", "enum": ["a", "b", None], "default": None},
            "pair": {
                "description": "A pair.",
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "items": {"type": "integer"},
                "default": [1, 2],
            },
            "path": {
                "description": "A path.",
                "title": "a path or null",
                "type": ["string", "null"],
                "pattern": "^[^\\u0000]+$",
                "format": "path",
                "default": None,
            },
            "inner": {
                "description": "Another.",
                "type": ["object", "null"],
                "additionalProperties": False,
                "required": ["number"],
                "default": None,
                "properties": {
                    "number": {
                        "description": "A number. null of it is in another line.",
                        "type": "integer",
                        "minimum": 1,
                        "maximum": 10**9,
                    }
                },
            },
            "partial": {
                "description": "Some of its keys.",
                "type": "object",
                "additionalProperties": False,
                "default": {},
                "properties": {
                    "number": {
                        "description": "A number. null of it is in another line.",
                        "type": "integer",
                        "minimum": 1,
                        "maximum": 10**9,
                    }
                },
            },
            "losses": {"description": "By name.", "type": "object", "additionalProperties": {"type": "number"}},
        },
    }


def test_every_stage_but_pretraining_can_have_a_teacher():
    stages = [name for name in get_args(types.StageName) if name != "pretrain"]
    assert subschema("bmcook", ("distillation", "stages", 0))["enum"] == stages


def test_root_keys_are_the_fields_of_the_run_config():
    names = {field.name for field in dataclasses.fields(types.RunConfig)}
    sections = {types.FIELD_OF.get(key, key) for key in load_schema("bmcook")["properties"]}
    assert sections | set(types.SCHEME_SECTIONS.values()) | set(types.DERIVED) == names
    assert list(load_schema("l0_pruning")["properties"]) == list(types.SCHEME_SECTIONS)


@pytest.mark.parametrize(
    "value, problem, said",
    [
        ({"gatse": {}}, "unknown key 'gatse'", "remedy: did you mean 'gates'?"),
        ({"xyz": 1}, "unknown key 'xyz'", "wanted: one of coarse-grained, fine-grained, joint, gates"),
        ({"gates": {"ramp": "0.5"}}, "wrong value at 'gates.ramp'", 'a number from 0 to 1, or "auto"\n  got:    "0.5"'),
        ({"gates": {"ramp": True}}, "wrong value at 'gates.ramp'", "got:    true"),
        ({"gates": {"ramp": None}}, "wrong value at 'gates.ramp'", "got:    null"),
        ({"gates": {"ramp": 1e400}}, "wrong value at 'gates.ramp'", "wanted: a finite number"),
        ({"gates": {"learning_rate": "fast"}}, "wrong value at 'gates.learning_rate'", '"auto"'),
        ({"gates": []}, "wrong value at 'gates'", "wanted: an object\n  got:    a list of 0 item(s)"),
        ({"\ud800": 1}, "unknown key '\\ud800'", "wanted: one of"),
        ({"gates": {"learning_rate": "\ud800"}}, "wrong value at 'gates.learning_rate'", "surrogate"),
    ],
)
def test_messages(value, problem, said):
    [finding] = schema_findings(value, "l0_pruning", "file.json")
    assert f"file.json: {problem}" in str(finding.error)
    assert said in str(finding.error)


def test_quotes_are_advised_only_where_text_is_wanted():
    remedies = [finding.error.remedy for finding in schema_findings({"output_dir": 5, "seed": "5"}, "bmcook", "f")]
    assert [remedy for remedy in remedies if remedy] == ["put it in double quotes"]
    assert schema_findings({"gates": {"learning_rate": 0}}, "l0_pruning", "f")[0].error.remedy is None


def test_a_missing_key_says_what_it_means():
    value = {"coarse-grained": {"train_mask": True, "target_sparsity": 0.5}}
    [finding] = schema_findings(value, "l0_pruning", "file.json")
    assert str(finding.error) == (
        "file.json: missing key 'coarse-grained.coarse_mask'\n"
        "  wanted: Layer mask file. Written when the mask is learned, read when it is fixed."
    )
    assert finding.section == "coarse-grained"


def test_an_integer_is_no_float_and_no_bool():
    for steps in (10.0, True, "10"):
        training = {"steps": steps, "train_batch_size": 1, "micro_batch_size": 1, "learning_rate": 1}
        findings = schema_findings({"training": training}, "bmcook", "f")
        places = [str(f.error) for f in findings if f.section == "training"]
        assert len(places) == 1 and "'training.steps'" in places[0]


def test_findings_come_in_the_order_of_the_file():
    value = {"gates": {"ramp": 2, "initial_log_alpha": 50}, "nope": 1}
    texts = [str(finding.error) for finding in schema_findings(value, "l0_pruning", "f")]
    assert [text.split("'")[1] for text in texts] == ["gates.ramp", "gates.initial_log_alpha", "nope"]


def test_one_finding_a_place_even_if_several_keywords_are_broken():
    config = {"prompt_types": 0, "position_bias_num_buckets": -2}
    findings = schema_findings({"model": {"type": "cpm_ant", "config": config}}, "bmcook", "f")
    texts = [str(finding.error) for finding in findings]
    assert sum("prompt_types'\n  wanted: an integer from 3" in text for text in texts) == 1
    assert sum("wrong value at 'model.config.position_bias_num_buckets'" in text for text in texts) == 1


def test_depth_is_limited_where_the_schema_looks_no_deeper():
    deep: dict = {}
    for _ in range(MAX_DEPTH):
        deep = {"a": deep}
    [finding] = schema_findings({"deepspeed": deep}, "bmcook", "f")
    assert finding.section == "" and "nested deeper" in str(finding.error)
    assert not any("nested" in str(f.error) for f in schema_findings({"deepspeed": deep["a"]}, "bmcook", "f"))


def test_infinity_is_found_in_free_form_sections():
    texts = [str(f.error) for f in schema_findings({"deepspeed": {"a": [1, float("inf")]}}, "bmcook", "f")]
    assert any("'deepspeed.a.1'" in text for text in texts)


def test_the_guilty_override_is_named():
    set_by = {("gates", "ramp"): "gates.ramp=7"}
    [finding] = schema_findings({"gates": {"ramp": 7}}, "l0_pruning", "f", set_by)
    assert str(finding.error).startswith("--set gates.ramp=7: ")


def test_long_values_are_shortened():
    assert len(shown("x" * 1000)) == 80 and shown("x") == '"x"'


def test_wanted_names_choices():
    assert (
        wanted(subschema("l0_pruning", ("fine-grained", "prune_mode")))
        == 'one of "att", "ffn", "experts", "headdim", "hidden"'
    )
