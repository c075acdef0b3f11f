"""The recipe as data: the table of the stages, and the recipes that differ from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cook.base.errors import UserError
from cook.config.load import load_config
from cook.config.types import RunConfig
from cook.recipe.plan import MaskPaths, Stage, plan_stage, recipe
from cook.recipe.summary import masks_after
from tests.recipe.tiny_run import ATT_FIRST, FFN_FIRST, write_run

L, H, D = (f"out/masks/{name}.pt" for name in ("layer", "heads", "dimff"))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def make(stages: tuple[str, ...] = (), *overrides: str, **changes: Any) -> RunConfig:
        write_run(tmp_path, stages, **changes)
        return load_config("bmcook.json", overrides)

    return make


def row(stage: Stage) -> tuple:
    held = stage.fixed
    [written] = {path for path in vars(stage.writes).values() if path} or {None}
    [learned] = stage.learns or (None,)
    return stage.name, learned, (held.layer, held.heads, held.dimff), written, stage.after


COMMON = [
    ("pretrain", None, (None, None, None), None, None),
    ("layer_mask", "layer", (None, None, None), L, "pretrain"),
    ("layer_finetune", None, (L, None, None), None, "layer_mask"),
]
TABLE = {
    ATT_FIRST: [
        *COMMON,
        ("att_mask", "heads", (L, None, None), H, "layer_finetune"),
        ("att_finetune", None, (L, H, None), None, "att_mask"),
        ("ffn_mask", "dimff", (L, H, None), D, "att_finetune"),
        ("ffn_finetune", None, (L, H, D), None, "ffn_mask"),
        ("random_baseline", None, (None, None, None), None, "pretrain"),
    ],
    FFN_FIRST: [
        *COMMON,
        ("ffn_mask", "dimff", (L, None, None), D, "layer_finetune"),
        ("ffn_finetune", None, (L, None, D), None, "ffn_mask"),
        ("att_mask", "heads", (L, None, D), H, "ffn_finetune"),
        ("att_finetune", None, (L, H, D), None, "att_mask"),
        ("random_baseline", None, (None, None, None), None, "pretrain"),
    ],
}


@pytest.mark.parametrize("order", [ATT_FIRST, FFN_FIRST])
@pytest.mark.parametrize("leftovers", [False, True])
def test_the_table_of_stages(config, tmp_path, order, leftovers):
    loaded = config(order)
    if leftovers:  # mask files of an earlier run say nothing where the recipe gives the order
        for path in (L, H, D):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("")
    assert [row(stage) for stage in recipe(loaded)] == TABLE[order]
    for expected in TABLE[order]:
        assert row(plan_stage(loaded, expected[0])) == expected, "a stage alone is that of the recipe"


JOINT = ("pretrain", "joint_mask", "joint_finetune", "random_baseline")


@pytest.mark.parametrize("blocks", [None, 0.3])
def test_a_joint_stage_writes_all_masks_and_reads_none(config, blocks):
    loaded = config(JOINT, joint={"train_mask": True, "target_sparsity": blocks})
    _, mask, finetune, baseline = recipe(loaded)
    assert mask.learns == (("layer",) if blocks else ()) + ("heads", "dimff")
    assert mask.fixed == MaskPaths() and mask.writes == MaskPaths(layer=L, heads=H, dimff=D)
    assert mask.after == "pretrain" and finetune.after == "joint_mask" and baseline.after == "pretrain"
    assert finetune.fixed == mask.writes and finetune.writes == MaskPaths() and finetune.learns == ()
    assert masks_after(mask) == masks_after(finetune) == mask.writes


HIDDEN = {"fine__target_hidden": 24, "fine__hidden_mask": "out/masks/hidden.pt"}


def test_hidden_stages_read_the_masks_before_them(config):
    stages = ("pretrain", "ffn_mask", "ffn_finetune", "hidden_mask", "hidden_finetune", "att_mask")
    planned = {stage.name: stage for stage in recipe(config(stages, **HIDDEN))}
    hidden = HIDDEN["fine__hidden_mask"]
    assert planned["ffn_finetune"].fixed == MaskPaths(layer=L, dimff=D)
    assert planned["hidden_mask"].learns == ("hidden",) and planned["hidden_mask"].writes == MaskPaths(hidden=hidden)
    assert planned["hidden_mask"].fixed == MaskPaths(layer=L, dimff=D)
    assert planned["hidden_finetune"].fixed == planned["att_mask"].fixed == MaskPaths(layer=L, dimff=D, hidden=hidden)


def test_a_joint_stage_learns_hidden_dims_if_they_have_a_target(config):
    joint = {"train_mask": True, "scope": "global"}
    _, mask, finetune, _ = recipe(config(JOINT, joint=joint, **HIDDEN))
    assert mask.learns == ("heads", "dimff", "hidden") and mask.writes.hidden == HIDDEN["fine__hidden_mask"]
    assert finetune.fixed == mask.writes
    _, mask, finetune, _ = recipe(config(JOINT, joint=joint, fine__hidden_mask=HIDDEN["fine__hidden_mask"]))
    assert mask.learns == ("heads", "dimff") and mask.writes.hidden is None and finetune.fixed.hidden is None


@pytest.mark.parametrize(
    ("stages", "changes", "kinds"),
    [
        (ATT_FIRST, {}, set()),
        (ATT_FIRST, {"fine__scope": "global"}, {"heads", "dimff"}),
        (("ffn_mask",), {"fine__scope": "global"}, {"dimff"}),
        (JOINT, {"fine__scope": "global", "joint": {"train_mask": True}}, set()),
        (JOINT, {"joint": {"train_mask": True, "scope": "global"}}, {"heads", "dimff"}),
        (ATT_FIRST, {"joint": {"train_mask": True, "scope": "global"}}, set()),
    ],
)
def test_a_scope_counts_where_its_stages_run(config, stages, changes, kinds):
    loaded = config(stages, **changes)
    assert [stage.uneven for stage in recipe(loaded)] == [kinds] * len(stages)


@pytest.mark.parametrize(("name", "section"), [("joint_mask", "joint"), ("joint_finetune", "joint")])
def test_a_stage_asked_for_by_hand_needs_its_section_too(config, name, section):
    with pytest.raises(UserError, match=f"{name} needs the section '{section}'"):
        plan_stage(config(), name)


SWITCHES = [
    ("pretrain", {"pruning__is_pruning": False}),
    ("layer_mask", {}),
    ("layer_finetune", {"coarse__train_mask": False}),
    ("att_mask", {"pruning__mask_method": "fine-grained"}),
    ("att_finetune", {"pruning__mask_method": "fine-grained", "fine__train_mask": False}),
    ("ffn_mask", {"pruning__mask_method": "fine-grained", "fine__prune_mode": "ffn"}),
    ("ffn_finetune", {"pruning__mask_method": "fine-grained", "fine__train_mask": False, "fine__prune_mode": "ffn"}),
    ("hidden_mask", {"pruning__mask_method": "fine-grained", "fine__prune_mode": "hidden", **HIDDEN}),
    ("joint_mask", {"pruning__mask_method": "joint"}),
    ("joint_finetune", {"pruning__mask_method": "joint", "joint__train_mask": False}),
]


@pytest.mark.parametrize(("name", "switches"), SWITCHES, ids=[name for name, _ in SWITCHES])
@pytest.mark.parametrize("stages", [(), ATT_FIRST])
def test_the_switches_of_the_two_files_describe_each_stage(config, name, switches, stages):
    joint = {"joint": {"train_mask": True}}
    loaded = config(stages, **joint, **switches)
    assert loaded.stage == name
    # Planning a stage sets the same switches again, whatever the files say.
    assert plan_stage(config(stages, **joint, **(HIDDEN if name == "hidden_mask" else {})), name).config.stage == name


@pytest.mark.parametrize(
    ("name", "there", "held"),
    [
        ("layer_mask", (L, H, D), MaskPaths()),
        ("layer_finetune", (), MaskPaths(layer=L)),
        ("att_mask", (), MaskPaths(layer=L)),
        ("att_mask", (L, D), MaskPaths(layer=L, dimff=D)),
        ("att_finetune", (L, H), MaskPaths(layer=L, heads=H)),
        ("att_finetune", (), MaskPaths(layer=L, heads=H)),
        ("att_finetune", (L, H, D), MaskPaths(layer=L, heads=H, dimff=D)),
        ("ffn_mask", (L, H), MaskPaths(layer=L, heads=H)),
        ("ffn_mask", (L,), MaskPaths(layer=L)),
        ("ffn_finetune", (L, H, D), MaskPaths(layer=L, heads=H, dimff=D)),
        ("ffn_finetune", (L, D), MaskPaths(layer=L, dimff=D)),
    ],
)
def test_a_single_stage_holds_the_other_fine_mask_where_its_file_is(config, tmp_path, name, there, held):
    loaded = config()
    for path in there:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    stage = plan_stage(loaded, name)
    assert stage.fixed == held and stage.after is None


@pytest.mark.parametrize("name", ["att_mask", "att_finetune"])
def test_a_recipe_without_the_other_kind_treats_both_of_its_stages_alike(config, tmp_path, name):
    stages = ("att_mask", "att_finetune")
    assert plan_stage(config(stages), name).fixed.dimff is None
    (tmp_path / D).parent.mkdir(parents=True)
    (tmp_path / D).write_text("")
    assert plan_stage(config(stages), name).fixed.dimff == D


def test_a_recipe_may_begin_anywhere(config):
    first, second = recipe(config(("layer_finetune", "att_mask")))
    assert first.after is None and first.fixed == MaskPaths(layer=L) and second.after == "layer_finetune"


def test_layers_that_are_already_gone_need_no_layer_mask(config):
    loaded = config(("att_mask", "ffn_mask"), fine__coarse_mask=None, model__config__mask_modules=[[False, True]] * 3)
    assert [stage.fixed for stage in recipe(loaded)] == [MaskPaths(), MaskPaths(heads=H)]


def test_a_mask_must_have_a_file_to_go_to(config):
    loaded = config(fine__dimff_mask=None)
    with pytest.raises(UserError, match="ffn_mask needs dimff_mask"):
        plan_stage(loaded, "ffn_mask")


def test_overrides_of_a_stage_count_in_its_plan_and_no_other(config):
    loaded = config(("pretrain", "layer_mask"), 'stages.0.training={"steps": 9}')
    assert [stage.config.training.steps for stage in recipe(loaded)] == [9, 6]


def prints(loaded: RunConfig) -> dict[str, str]:
    return {stage.name: stage.fingerprint() for stage in recipe(loaded)}


@pytest.mark.parametrize(
    "setting",
    [
        "seed=9",
        "training.learning_rate=0.5",
        "training.clip=0.1",
        "data.max_length=44",
        "tokenizer.vocab_size=410",
        "model.config.dim_ff=24",
        "training.train_weights=false",
        'deepspeed.optimizer={"type": "Lamb"}',
    ],
)
def test_every_setting_that_decides_the_outcome_is_in_the_fingerprint(config, setting):
    before, after = prints(config(ATT_FIRST)), prints(config(ATT_FIRST, setting))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == (set() if setting == "model.config.dim_ff=24" else set(ATT_FIRST))


@pytest.mark.parametrize(
    "setting, concerned",
    [
        ("gates.ramp=0.5", {"layer_mask", "att_mask", "ffn_mask", "random_baseline"}),
        ("fine-grained.target_num_heads=1", {"att_mask", "random_baseline"}),
        ("coarse-grained.target_sparsity=0.4", {"layer_mask", "random_baseline"}),
        ("fine-grained.heads_mask=elsewhere.pt", set()),
        ("fine-grained.scope=global", {"att_mask", "ffn_mask", "random_baseline"}),
    ],
)
def test_a_target_concerns_the_stages_that_it_shapes(config, setting, concerned):
    before, after = prints(config(ATT_FIRST)), prints(config(ATT_FIRST, setting))
    assert {name for name in before if before[name] != after[name]} == concerned & set(ATT_FIRST)


@pytest.mark.parametrize(
    ("setting", "concerns"),
    [
        ("joint.scope=global", True),
        ("joint.target_sparsity=0.2", True),
        ("fine-grained.target_dimff=4", True),
        ("joint.train_mask=false", False),
        ("fine-grained.scope=global", False),
    ],
)
def test_the_targets_of_a_joint_stage_are_its_own(config, setting, concerns):
    before = prints(config(JOINT, joint={"train_mask": True}))
    after = prints(config(JOINT, setting, joint={"train_mask": True}))
    changed = {name for name in before if before[name] != after[name]} - {"random_baseline"}
    assert changed == ({"joint_mask"} if concerns else set())
    assert before["random_baseline"] != after["random_baseline"] or not concerns


@pytest.mark.parametrize(
    "setting",
    [
        "training.log_every=3",
        "training.save_every=5",
        "training.keep_checkpoints=9",
        "training.threads=2",
        "training.micro_batch_size=1",
        "training.eval_rows=8",
        "logging.tensorboard=true",
        "data.cache_dir=elsewhere",
        "data.workers=2",
        "data.ledger=true",
        "deepspeed.zero_optimization.stage=2",
        "output_dir=moved",
        "training.max_bad_steps=9",
        "training.spike=skip",
        "training.spike_factor=4",
        "training.spike_window=9",
        "training.spike_measure=loss",
    ],
)
def test_how_and_where_to_run_is_not_in_the_fingerprint(config, setting):
    assert prints(config(ATT_FIRST)) == prints(config(ATT_FIRST, setting))


def test_stages_have_different_fingerprints(config):
    assert len(set(prints(config(ATT_FIRST)).values())) == len(ATT_FIRST)


QUANT = {"quantization": {"is_quant": True}}


def test_quantize_keeps_the_masks_of_the_recipe_before_it(config, tmp_path):
    for path in (L, H, D):  # of an earlier run
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    stages = (*ATT_FIRST[:-1], "quantize", "random_baseline")
    assert row(plan_stage(config(stages, **QUANT), "quantize")) == ("quantize", None, (L, H, D), None, "ffn_finetune")
    # A mask that no stage of the recipe makes is applied if it exists, as in other stages.
    assert plan_stage(config(("layer_mask", "quantize"), **QUANT), "quantize").fixed == MaskPaths(
        layer=L, heads=H, dimff=D
    )
    joint = {"joint": {"train_mask": True, "scope": "global", "target_params": 0.5}}
    found = plan_stage(config(("joint_mask", "quantize"), **QUANT, **joint), "quantize")
    assert found.fixed == MaskPaths(layer=L, heads=H, dimff=D) and found.after == "joint_mask"
    with pytest.raises(UserError, match="quantize needs the section 'quantization'"):
        plan_stage(config(("layer_mask",)), "quantize")


def test_quantize_behind_a_pattern_holds_its_mask(config):
    mask = {"pruning__mask_method": "m4n2_1d", "pruning__pruning_mask_path": "out/p.safetensors"}
    stage = plan_stage(config(("pretrain", "pattern", "quantize"), **QUANT, **mask), "quantize")
    assert stage.fixed == MaskPaths() and stage.inherited_masks() == ["out/p.safetensors"] and not stage.traces()
    assert stage.pattern_settings()["method"] == "m4n2_1d"


def test_a_run_without_embeddings_has_the_fingerprint_of_runs_before_that_setting(config):
    old = config(("quantize",), **QUANT)
    stage = plan_stage(old, "quantize")
    assert stage.quantization_settings()["quantization"].keys().isdisjoint({"embeddings"})
    other = config(("quantize",), quantization={"is_quant": True, "embeddings": True})
    assert plan_stage(other, "quantize").fingerprint() != stage.fingerprint()


def test_the_section_is_part_of_the_fingerprint_of_its_stage_alone(config):
    one = config(("pretrain", "quantize"), **QUANT)
    other = config(("pretrain", "quantize"), quantization={"is_quant": True, "scheme": "int4", "group_size": 8})
    for name, same in (("pretrain", True), ("quantize", False)):
        assert (plan_stage(one, name).fingerprint() == plan_stage(other, name).fingerprint()) == same
