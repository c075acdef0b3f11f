"""The order of the recipe, the sizes of the scheme, and the masks that a stage needs."""

from __future__ import annotations

import json

import pytest

from cook.config.types import for_stage

JOINT = ["joint_mask", "joint_finetune"]
ATT, FFN, LAYER = ["att_mask", "att_finetune"], ["ffn_mask", "ffn_finetune"], ["layer_mask", "layer_finetune"]
HIDDEN = ["hidden_mask", "hidden_finetune"]


def recipe(names):
    return "stages=" + json.dumps([{"name": name} for name in names])


@pytest.mark.parametrize(
    "names",
    [
        ["pretrain", *LAYER, *ATT, *FFN, "random_baseline"],
        ["pretrain", *LAYER, *FFN, *ATT, "random_baseline"],
        [*ATT, *FFN],
        LAYER,
        ["layer_finetune", "ffn_mask"],
        ["pretrain"],
        [],
    ],
)
def test_recipes_in_order(load, names):
    assert [entry.name for entry in load(recipe(names)).stages] == names


@pytest.mark.parametrize(
    "names, said",
    [
        (["layer_mask", "pretrain"], "pretrain must come first"),
        (["random_baseline", "layer_mask"], "random_baseline must come last"),
        (["layer_finetune", "layer_mask"], "layer_mask must come before layer_finetune"),
        (["att_finetune", "att_mask"], "att_mask must come before att_finetune"),
        ([*ATT, *LAYER], "the layer stages must come before"),
        (["layer_mask", "att_mask", "layer_finetune"], "the layer stages must come before"),
        (["att_mask", "ffn_mask", "att_finetune", "ffn_finetune"], "the att and ffn stages are interleaved"),
        (["att_mask", "att_mask"], "att_mask is listed twice"),
        (["joint_finetune", "joint_mask"], "joint_mask must come before joint_finetune"),
        ([*JOINT, *FFN], "joint stages cannot be combined with"),
        ([*LAYER, *JOINT], "joint stages cannot be combined with"),
    ],
)
def test_recipes_out_of_order(errors_of, names, said):
    [message] = errors_of(recipe(names), "joint.train_mask=true")
    assert said in message


def test_hidden_stages_need_their_target_and_their_mask(errors_of, load):
    messages = errors_of(recipe([*LAYER, *HIDDEN]))
    assert [message.split(":")[0] for message in messages] == ["fine-grained.target_hidden", "fine-grained.hidden_mask"]
    given = ["fine-grained.target_hidden=24", "fine-grained.hidden_mask=results/tiny/hidden.pt"]
    assert load(recipe([*LAYER, *HIDDEN]), *given).fine.target_hidden == 24
    assert load(recipe(JOINT), "joint.train_mask=true").fine.target_hidden is None
    [message] = errors_of(recipe(JOINT), "joint.train_mask=true", given[0])
    assert message.startswith("fine-grained.hidden_mask: missing")
    [message] = errors_of(recipe(["att_mask", "hidden_mask", "att_finetune", "hidden_finetune"]), *given)
    assert "the att and hidden stages are interleaved" in message


def test_targets_are_multiples_of_round_to(errors_of, load):
    hidden = ["fine-grained.target_hidden=24", "fine-grained.hidden_mask=results/tiny/hidden.pt"]
    messages = errors_of(*hidden, "fine-grained.round_to=16")
    assert [message.split(" ")[0] for message in messages] == [
        "fine-grained.target_dimff:",
        "fine-grained.target_hidden:",
    ]
    assert load(*hidden, "fine-grained.round_to=8").fine.round_to == 8


@pytest.mark.parametrize("method", ["coarse-grained", "fine-grained"])
def test_an_unstructured_mask_is_refused(errors_of, method):
    [message] = errors_of("pruning.pruning_mask_path=mask.pt", f"pruning.mask_method={method}")
    assert message.startswith(
        f"pruning.pruning_mask_path: {method} pruning does not use a mask of single weights\n  wanted: null"
    )


def test_the_described_stage_needs_its_section(errors_of, load, scheme):
    coarse = scheme.pop("coarse-grained")
    load("stages=[]")
    assert "coarse-grained: missing from the scheme" in errors_of("stages=[]", "pruning.mask_method=coarse-grained")[0]
    load("stages=[]", "pruning.mask_method=coarse-grained", "pruning.is_pruning=false")
    del scheme["fine-grained"]
    assert "fine-grained: missing from the scheme" in errors_of("stages=[]")[0]
    scheme["coarse-grained"] = coarse
    load("stages=[]", "pruning.mask_method=coarse-grained")


def test_the_recipes_stages_need_their_sections(errors_of, scheme):
    scheme.clear()
    messages = errors_of(recipe([*LAYER, *FFN]), "pruning.is_pruning=false")
    assert [message.split(":")[0] for message in messages] == ["coarse-grained", "fine-grained"]
    assert "stages.layer_mask" in messages[0] and "stages.ffn_mask" in messages[1]


@pytest.mark.parametrize(
    "mode, names, missing, needed",
    [
        ("ffn", [], "heads_mask", True),
        ("ffn", [], "dimff_mask", True),
        ("att", [], "heads_mask", True),
        ("att", [], "dimff_mask", False),
        ("att", [*FFN, *ATT], "dimff_mask", True),
        ("att", LAYER, "dimff_mask", False),
    ],
)
def test_the_masks_of_a_fine_stage(errors_of, load, scheme, mode, names, missing, needed):
    del scheme["fine-grained"][missing]
    scheme["fine-grained"]["prune_mode"] = mode
    if needed:
        assert errors_of(recipe(names))[0].startswith(f"fine-grained.{missing}: missing")
    else:
        load(recipe(names))


def test_masks_are_not_needed_by_stages_that_do_not_run(load, scheme):
    scheme["fine-grained"] |= {"heads_mask": None, "dimff_mask": None, "coarse_mask": None}
    load(recipe(LAYER), "pruning.mask_method=coarse-grained")


@pytest.mark.parametrize(
    "mask_modules, needed",
    [("null", True), ("[[false, false], [false, false]]", True)] + [("[[false, false], [false, true]]", False)],
)
def test_the_layer_mask_is_needed_until_layers_are_removed(errors_of, load, scheme, mask_modules, needed):
    del scheme["fine-grained"]["coarse_mask"]
    settings = "stages=[]", f"model.config.mask_modules={mask_modules}"
    if needed:
        [message] = errors_of(*settings)
        assert message.startswith("fine-grained.coarse_mask: missing")
    else:
        assert load(*settings).fine.coarse_mask is None


def test_a_folder_tells_whether_layers_are_removed(errors_of, load, bmcook, scheme, elsewhere):
    bmcook["model"] = {"type": "cpm_ant", "path": "model"}
    scheme["fine-grained"]["coarse_mask"] = None
    (elsewhere / "model").mkdir()
    (elsewhere / "model" / "config.json").write_text('{"mask_modules": [[true, false]]}')
    load("stages=[]")
    (elsewhere / "model" / "config.json").write_text('{"mask_modules": null}')
    assert errors_of("stages=[]")[0].startswith("fine-grained.coarse_mask: missing")


def test_a_recipe_that_removes_layers_needs_the_mask_whatever_the_model(errors_of):
    removed = "model.config.mask_modules=[[false, true], [false, false]]"
    assert "fine-grained.coarse_mask: missing" in errors_of(removed, "fine-grained.coarse_mask=null")[0]


def test_the_recipe_has_one_layer_mask(errors_of, load):
    [message] = errors_of("fine-grained.coarse_mask=results/tiny/other.pt")
    assert "wanted: results/tiny/layer.pt" in message
    assert load("fine-grained.coarse_mask=results/./tiny/layer.pt")
    assert load("fine-grained.coarse_mask=results/tiny/other.pt", recipe(ATT))


@pytest.mark.parametrize(
    "key, path",
    [
        ("dimff_mask", "results/tiny/heads.pt"),
        ("heads_mask", "results/tiny/layer.pt"),
        ("dimff_mask", "results/../results/tiny/heads.pt"),
    ],
)
def test_masks_do_not_share_a_file(errors_of, key, path):
    [message] = errors_of(f"fine-grained.{key}={path}")
    assert message.startswith(f"fine-grained.{key}: the same file as")


@pytest.mark.parametrize(
    "setting, said",
    [
        ("target_num_heads=5", "fine-grained.target_num_heads: above num_heads\n  wanted: at most 4"),
        ("target_dimff=49", "fine-grained.target_dimff: above dim_ff\n  wanted: at most 48"),
        ("num_heads=8", "fine-grained.num_heads: differs from the model\n  wanted: 4,"),
        ("dim_ff=47", "fine-grained.dim_ff: differs from the model\n  wanted: 48,"),
        ("target_num_heads=0", "wrong value at 'fine-grained.target_num_heads'"),
        ("heads_mask=mask.bin", "wanted: a path that ends in .pt"),
        ("heads_mask=.pt", "wanted: a path that ends in .pt"),
    ],
)
def test_sizes(errors_of, setting, said):
    [message] = errors_of(f"fine-grained.{setting}")
    assert said in message


def test_targets_may_be_all_there_is(load):
    load("fine-grained.target_num_heads=4", "fine-grained.target_dimff=48")


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, "true", "half"])
def test_sparsity_is_between_0_and_1(errors_of, sparsity):
    assert len(errors_of(f"coarse-grained.target_sparsity={sparsity}")) == 1


def test_a_joint_recipe_loads(load):
    settings = recipe(["pretrain", *JOINT, "random_baseline"]), "pruning.mask_method=joint", "joint.train_mask=true"
    assert load(*settings).joint.scope == "block"
    budget = "joint.scope=global", "joint.target_flops=0.5", "joint.flops_length=64"
    assert load(*settings, *budget).joint.target_flops == 0.5
    assert load(*settings, "joint.scope=global").joint.target_params is None


@pytest.mark.parametrize("asked", [recipe(JOINT), "pruning.mask_method=joint"])
def test_a_joint_stage_needs_both_sections_and_all_masks(errors_of, scheme, asked):
    asked = [asked, "pruning.is_pruning=" + str(asked.startswith("pruning")).lower()]
    asked += [] if asked[0].startswith("stages") else ["stages=[]"]
    messages = errors_of(*asked)
    assert [message.split(":")[0] for message in messages] == ["joint"]
    scheme["joint"] = {"train_mask": True}
    scheme["fine-grained"] |= {"coarse_mask": None, "heads_mask": None, "dimff_mask": None}
    messages = [message.split("\n")[0] for message in errors_of(*asked)]
    assert messages == [f"fine-grained.{key}_mask: missing" for key in ("heads", "dimff", "coarse")]
    del scheme["fine-grained"]
    assert [message.split(":")[0] for message in errors_of(*asked)] == ["fine-grained"]


def test_all_mistakes_of_a_joint_budget_are_told_at_once(errors_of, load, scheme):
    scheme["joint"] = {"train_mask": True, "target_params": 0.5, "target_flops": 0.5, "flops_length": 9}
    messages = errors_of()
    assert [message.split(":")[0] for message in messages] == [
        "joint.target_params",
        "joint.target_flops",
        "joint.flops_length",
        "joint",
    ]
    assert all("valid only for scope 'global'\n  got:    scope 'block'" in message for message in messages[:3])
    scheme["joint"] |= {"scope": "global", "target_sparsity": 0.5}
    messages = errors_of()
    assert messages[0].startswith("joint.target_sparsity: valid only for scope 'block'")
    assert "2 budgets" in messages[1]
    assert "a block without any units left is removed" in messages[0] and len(messages) == 2
    scheme["joint"] |= {"target_sparsity": None, "target_flops": None}
    assert errors_of()[0].startswith("joint.flops_length: unused, because target_flops")
    scheme["joint"]["flops_length"] = None
    assert load().joint.target_params == 0.5


def test_several_sizes_descend(errors_of, load, scheme):
    scheme["joint"] = {"train_mask": True, "scope": "global", "target_params": [0.8, 0.65, 0.5]}
    loaded = load().joint
    assert loaded.sizes == (0.8, 0.65, 0.5) and loaded.share(2) == 0.5
    scheme["joint"]["target_params"] = 0.5
    assert load().joint.sizes == () and load().joint.share() == 0.5
    scheme["joint"] |= {"target_params": None, "target_flops": [0.5, 0.5000000001, 0.8]}
    messages = errors_of(recipe(["pretrain", *JOINT, "random_baseline"]))
    assert [message.split("\n")[0] for message in messages] == [
        "joint.target_flops: not in descending order",
        "joint.target_flops: shares differ by less than 6 digits, by which their mask files are named",
        "stages: random_baseline makes one model, and the scheme has several sizes",
    ]
    scheme["joint"]["target_params"] = [0.8, 0.5]
    assert any("2 budgets" in message for message in errors_of())
    scheme["joint"] |= {"target_flops": None, "scope": "block"}
    [message] = errors_of()
    assert message.startswith("joint.target_params: valid only for scope 'global'")


@pytest.mark.parametrize("shares", [[0.5], [0.8, 0], [0.8, 1.5], [0.8, "0.5"], [0.5] * 17])
def test_sizes_are_shares(errors_of, shares):
    messages = errors_of("joint.train_mask=true", "joint.scope=global", f"joint.target_params={json.dumps(shares)}")
    assert messages and all("wrong value at 'joint.target_params" in message for message in messages)


def test_a_budget_in_milliseconds_needs_its_table(errors_of, load, scheme, tmp_path):
    scheme["joint"] = {"train_mask": True, "scope": "global", "target_latency": 5.0}
    [message] = errors_of()
    assert message.startswith("joint.block_times: missing") and "cook profile" in message
    scheme["joint"]["block_times"] = str(tmp_path / "times.json")
    [message] = errors_of()
    assert message.startswith("joint.block_times: there is no such file")
    (tmp_path / "times.json").write_text("{}")
    assert load().joint.target_latency == 5.0
    scheme["joint"] |= {"target_latency": None, "target_memory": 90.0, "cache_length": 10}
    assert [message.split("\n")[0] for message in errors_of()] == [
        "joint.block_times: unused, because target_latency is not set"
    ]
    scheme["joint"]["block_times"] = None
    assert load().joint.cache_length == 10
    assert len(errors_of("joint.target_memory=0")) == 1


@pytest.mark.parametrize("share", [0, 1, 1.5, 2000000, "true"])
@pytest.mark.parametrize("key", ["target_params", "target_flops"])
def test_a_budget_is_a_share(errors_of, key, share):
    [message] = errors_of("joint.train_mask=true", "joint.scope=global", f"joint.{key}={share}")
    assert f"wrong value at 'joint.{key}'" in message


MASK = "results/tiny/pattern.safetensors"


@pytest.fixture
def pattern(bmcook):
    bmcook["pruning"] |= {"mask_method": "pattern", "pruning_mask_path": MASK}
    bmcook["pattern"] = {"type": "tile_wise_k", "sparsity": 75}
    bmcook["stages"] = [{"name": "pretrain"}, {"name": "pattern"}]
    return bmcook


def test_a_pattern_is_read(pattern, load):
    config = load('pattern.quirks=["revive"]')
    assert (config.pattern.type, config.pattern.sparsity, config.pattern.quirks) == ("tile_wise_k", 75.0, ("revive",))
    assert config.stage == "pattern"
    assert for_stage(config, "pattern").pruning.mask_method == "pattern"


@pytest.mark.parametrize("method", ["m4n2_1d", "m4n2_2d"])
def test_two_of_four_needs_no_section(pattern, load, method):
    del pattern["pattern"]
    config = load(f"pruning.mask_method={method}")
    assert for_stage(config, "pattern").stage == "pattern"
    assert for_stage(config, "pattern").pruning.mask_method == method


@pytest.mark.parametrize(
    "override, said",
    [
        ("pattern=null", "pattern: missing"),
        ("pruning.pruning_mask_path=null", "a pattern needs a mask file"),
        ("pruning.pruning_mask_path=x.pt", "a pattern needs a mask file"),
        ("pattern.previous_mask=gone.safetensors", "there is no such file"),
        ("pattern.type=9", "wrong value at 'pattern.type'"),
        ('pattern.quirks=["luck"]', "wrong value at 'pattern.quirks.0'"),
        ("pattern.sparsity=101", "wrong value at 'pattern.sparsity'"),
    ],
)
def test_mistakes(pattern, errors_of, override, said):
    assert any(said in error for error in errors_of(override))


def test_the_mask_that_is_read_is_not_the_one_that_is_written(pattern, errors_of, elsewhere):
    (elsewhere / "mask.safetensors").touch()
    [error] = errors_of("pattern.previous_mask=mask.safetensors", "pruning.pruning_mask_path=./mask.safetensors")
    assert "pattern.previous_mask: this stage writes the same file" in error


def test_patterns_and_gates_are_not_mixed(pattern, errors_of):
    pattern["stages"].append({"name": "layer_mask"})
    assert any("pattern cannot be combined with stages that learn gates" in error for error in errors_of())


def test_other_methods_have_no_mask_of_single_weights(bmcook, errors_of):
    bmcook["pruning"]["pruning_mask_path"] = MASK
    assert any("does not use a mask of single weights" in error for error in errors_of())
