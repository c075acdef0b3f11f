"""Reading both files: values land in the right fields with the right types, and mistakes come all at once."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from cook.base.errors import UserError, UserErrors
from cook.config.load import apply_override, load_config, parse_override
from cook.config.types import CoarseConfig, DistillationConfig, FineConfig, GatesConfig, StageEntry


def files_below(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def test_every_section_is_built(load):
    config = load()
    assert config.output_dir == "results/tiny"
    assert config.model.config["dim_ff"] == 48 and config.model.path is None
    assert config.data.max_length == 32 and config.data.paths == ()
    assert config.training.steps == 10 and config.training.learning_rate == 0.01
    assert config.pruning.pruned_module == ("project_q.weight",)
    assert config.coarse == CoarseConfig(train_mask=True, coarse_mask="results/tiny/layer.pt", target_sparsity=0.5)
    assert isinstance(config.fine, FineConfig) and config.fine.target_dimff == 24
    assert config.gates == GatesConfig() and config.gates.learning_rate is None
    assert config.stages[0] == StageEntry(name="pretrain", training={"steps": 20})
    assert config.source.bmcook == "bmcook.json" and config.source.l0_pruning == "l0_pruning.json"
    assert config.distillation is None and config.deepspeed == {}


def test_left_out_keys_have_the_dataclass_defaults(load):
    training = load().training
    defaults = {f.name: f.default for f in dataclasses.fields(training) if f.default is not dataclasses.MISSING}
    assert len(defaults) == 22
    assert {name: getattr(training, name) for name in defaults} == defaults


def test_whole_numbers_become_floats_where_the_field_is_one(load, bmcook):
    bmcook["training"]["clip"] = 2
    bmcook["stages"][0]["training"]["learning_rate"] = 1
    config = load()
    assert type(config.training.clip) is float
    assert type(config.stages[0].training["learning_rate"]) is float
    assert type(config.training.steps) is int


def test_auto_gates_and_a_number(load, scheme):
    scheme["gates"] = {"learning_rate": "auto", "ramp": 1}
    assert load().gates == GatesConfig(learning_rate=None, ramp=1.0)
    scheme["gates"] = {"learning_rate": 1}
    assert load().gates.learning_rate == 1.0


def test_distillation(load, bmcook, elsewhere):
    (elsewhere / "teacher").mkdir()
    pair = "[post]encoder.output_layernorm:[pre]encoder.layers.1"
    bmcook["distillation"] = {
        "teacher": "teacher",
        "mse_hidn_scale": 1,
        "mse_hidn_module": [pair],
        "mse_hidn_proj": True,
        "mse_att_scale": 2,
        "mse_att_module": [pair],
        "teacher_device": "cpu",
        "stages": ["att_mask"],
    }
    expected = DistillationConfig(
        teacher="teacher",
        mse_hidn_scale=1.0,
        mse_hidn_module=(pair,),
        mse_hidn_proj=True,
        mse_att_scale=2.0,
        mse_att_module=(pair,),
        teacher_device="cpu",
        stages=("att_mask",),
    )
    assert load().distillation == expected


def test_companion_files_take_the_place_of_their_paths(load, bmcook, elsewhere):
    (elsewhere / "model.json").write_text(json.dumps(bmcook["model"]["config"]))
    (elsewhere / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    bmcook["model"]["config"], bmcook["deepspeed"] = "model.json", "ds.json"
    config = load("model.config.num_layers=7", "deepspeed.gradient_clipping=1")
    assert config.model.config["num_layers"] == 7 and config.model.config["dim_model"] == 32
    assert config.deepspeed == {"zero_optimization": {"stage": 3}, "gradient_clipping": 1}


def test_an_override_can_name_another_companion(load, bmcook, elsewhere):
    (elsewhere / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    bmcook["deepspeed"] = "missing.json"
    config = load("deepspeed=ds.json", "deepspeed.zero_optimization.stage=1")
    assert config.deepspeed == {"zero_optimization": {"stage": 1}}


def test_a_companion_is_blamed_by_its_own_name(errors_of, bmcook, elsewhere):
    (elsewhere / "ds.json").write_text("[1]")
    bmcook["model"]["config"], bmcook["deepspeed"] = "nowhere.json", "ds.json"
    messages = errors_of()
    assert any("nowhere.json: there is no such file" in message for message in messages)
    assert any("ds.json: not a JSON object" in message for message in messages)
    assert len(messages) == 2, messages


def test_the_scheme_is_relative_to_the_other_file(bmcook, scheme, elsewhere):
    (elsewhere / "a" / "b").mkdir(parents=True)
    (elsewhere / "a" / "scheme.json").write_text(json.dumps(scheme))
    bmcook["pruning"]["l0_pruning"] = "../scheme.json"
    (elsewhere / "a" / "b" / "bmcook.json").write_text(json.dumps(bmcook))
    config = load_config(elsewhere / "a" / "b" / "bmcook.json")
    assert config.coarse is not None and config.source.l0_pruning == str(elsewhere / "a/b/../scheme.json")


def test_plain_pretraining_needs_no_scheme(bmcook, elsewhere):
    bmcook["pruning"]["is_pruning"], bmcook["stages"] = False, [{"name": "pretrain"}]
    (elsewhere / "bmcook.json").write_text(json.dumps(bmcook))
    config = load_config("bmcook.json")
    assert config.coarse is None and config.fine is None and config.source.l0_pruning is None


@pytest.mark.parametrize(
    "setting", ["pruning.is_pruning=true", 'stages=[{"name": "layer_mask"}]', "pruning.l0_pruning=l0_pruning.json"]
)
def test_everything_else_does(bmcook, elsewhere, setting):
    bmcook["pruning"]["is_pruning"], bmcook["stages"] = False, []
    (elsewhere / "bmcook.json").write_text(json.dumps(bmcook))
    with pytest.raises(UserErrors, match="l0_pruning.json: there is no such file"):
        load_config("bmcook.json", [setting])


def test_mistakes_of_both_files_and_of_overrides_in_one_report(load, bmcook, scheme):
    bmcook["training"]["step"] = 5  # unknown, near "steps"
    bmcook["data"]["max_length"] = "long"  # type
    del bmcook["tokenizer"]["vocab_size"]  # missing
    scheme["coarse-grained"]["target_sparsity"] = 1  # range
    scheme["fine-grained"]["target_num_heads"] = 9  # cross-check, its section is sound
    bmcook["output_dir"] = "/"  # not computable: it is checked together with the broken data section
    with pytest.raises(UserErrors) as caught:
        load("seed=-1", "nonsense")
    messages = [str(error) for error in caught.value.errors]
    for text in (
        "--set nonsense: not a setting",
        "--set seed=-1: wrong value at 'seed'",
        "bmcook.json: unknown key 'training.step'\n  remedy: did you mean 'steps'?",
        "wrong value at 'data.max_length'\n  wanted: an integer from 1 to 1000000000\n  got:    \"long\"",
        "bmcook.json: missing key 'tokenizer.vocab_size'",
        "l0_pruning.json: wrong value at 'coarse-grained.target_sparsity'",
        "fine-grained.target_num_heads: above num_heads",
    ):
        assert sum(text in message for message in messages) == 1, (text, messages)
    assert len(messages) == 7
    assert str(caught.value).startswith("bmcook.json: the configuration cannot be used: 7 errors\n1. ")


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"seed": 1, "seed": 2}', "'seed' appears twice"),
        ('{"seed": NaN}', "NaN is not a finite JSON number"),
        ('{"seed": 1', "not valid JSON, line 1"),
        ("[" * 100_000, "nested too deeply"),
        ('{"seed": ' + "9" * 5000 + "}", "not a usable number"),
        ("[1]", "wrong value at the top"),
        ("null", "wrong value at the top"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "there is no such file"),
    ],
)
def test_unreadable_files_are_reported_beside_the_mistakes_of_the_other(elsewhere, scheme, content, said):
    if content is not None:
        (elsewhere / "bmcook.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    scheme["coarse-grained"]["target_sparsity"] = 2
    (elsewhere / "l0_pruning.json").write_text(json.dumps(scheme))
    with pytest.raises(UserErrors) as caught:
        load_config("bmcook.json")
    messages = [str(error) for error in caught.value.errors]
    assert any(said in message for message in messages), messages
    assert any("'coarse-grained.target_sparsity'" in message for message in messages), messages


def test_an_unreadable_scheme_leaves_the_other_file_checked(elsewhere, bmcook):
    bmcook["training"]["steps"] = 0
    (elsewhere / "bmcook.json").write_text(json.dumps(bmcook))
    (elsewhere / "l0_pruning.json").write_text("{")
    with pytest.raises(UserErrors) as caught:
        load_config("bmcook.json")
    assert len(caught.value.errors) == 2


def test_nothing_is_written(load, elsewhere):
    load()
    with pytest.raises(UserErrors):
        load("training.steps=0")
    assert [str(path) for path in files_below(elsewhere)] == ["bmcook.json", "l0_pruning.json"]


def test_the_sections_cannot_be_changed(load):
    config = load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.training.steps = 5


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
