"""Whole stages with a teacher: which model it is, which places are compared, and how it resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cook.base.errors import UserError
from cook.config.load import load_config
from cook.export.model_folder import write_model_folder
from cook.export.pruned_folder import prune_to_folder
from cook.families.cpm_ant import ADAPTER
from cook.families.source import open_model
from cook.recipe.distillation import open_distillation
from cook.recipe.inputs import open_inputs
from cook.recipe.plan import plan_stage
from cook.report.events import TIMES
from tests.recipe.test_stock import write_stock_run
from tests.recipe.tiny_run import MODEL, read_log, train, write_run
from tests.tiny_families import tiny_source

ATTENTION = [
    f"[post]encoder.layers.{i}.self_att.self_attention.attention_out:"
    f"[post]encoder.layers.{i}.self_att.self_attention.attention_out"
    for i in range(3)
]
HIDDEN = [
    "[post]encoder.layers.1:[post]encoder.layers.1",
    "[pre]encoder.output_layernorm:[pre]encoder.output_layernorm",
]
SELF = {
    "teacher": "self",
    "ce_scale": 1,
    "ce_temp": 2,
    "mse_hidn_scale": 0.5,
    "mse_hidn_module": HIDDEN,
    "mse_att_scale": 0.5,
    "mse_att_module": ATTENTION,
}
FROZEN = {"train_weights": False}
MASKS = ("layer_mask", "att_mask")


def write_frozen_run(folder: Path, names: Sequence[str] = ("pretrain", *MASKS), **changes: Any) -> None:
    """Stages whose masks are learned while the weights stand still."""
    # A model that is its own teacher is trained whole. Bit for bit comparisons with it need the same sums.
    defaults = {"distillation": SELF, "coarse__target_sparsity": 0.5, "training__steps": 4}
    defaults["training__remove_masked"] = False
    write_run(folder, names, **(defaults | changes))
    config = json.loads((folder / "bmcook.json").read_text())
    for entry in config["stages"]:
        entry["training"] = FROZEN if entry["name"] in MASKS else {}
    (folder / "bmcook.json").write_text(json.dumps(config))


def learned(folder: Path) -> list[dict[str, Any]]:
    """What the mask stages have logged, but for the time that it took."""
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for stage in MASKS
        for record in read_log(folder, stage)
        if "data" not in record
    ]


def test_a_model_teaches_itself_what_its_dense_copy_on_disk_would(tmp_path):
    itself, copy = tmp_path / "itself", tmp_path / "copy"
    write_frozen_run(itself)
    done = train(itself, "--stage", "all")
    assert done.code == 0, done
    assert "layer_mask: the model is its own teacher, with all masks open" in done.out
    assert "att_mask: the model is its own teacher, with all masks open" in done.out
    removed = json.loads((itself / "out/att_mask/done.json").read_text())["structure"]["layers"]
    dead = [pair for pair, layer in zip(ATTENTION, removed, strict=True) if layer["att"] is None]
    assert dead and f"a mask removes the student's block: {', '.join(dead)}\n" in done.out

    write_frozen_run(copy, distillation=SELF | {"teacher": "dense", "stages": list(MASKS)})
    shutil.copytree(itself / "out/pretrain/model", copy / "dense")
    done = train(copy, "--stage", "all")
    assert done.code == 0, done
    # Bit for bit: the teacher computes the same, and the student's pass does not notice the other one.
    assert learned(itself) == learned(copy) and len(learned(itself)) == 2 * 5
    for stage in MASKS:
        ours, theirs = (load_file(folder / f"out/{stage}/model/model.safetensors") for folder in (itself, copy))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_projection_resumes(tmp_path):
    adapter_config = {**MODEL, "model_type": "cook_cpm_ant", "dim_model": 48}
    torch.manual_seed(0)
    model = ADAPTER.build(adapter_config)
    wide = {"teacher": "wide", "mse_hidn_scale": 1, "mse_hidn_module": HIDDEN, "mse_hidn_proj": True}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    write_run(whole, ("pretrain", "layer_mask"), distillation=wide, training__save_every=2, training__steps=4)
    write_model_folder(whole / "wide", ADAPTER, adapter_config, model.named_parameters())
    assert (done := train(whole, "--stage", "all")).code == 0, done
    shutil.copytree(whole, stopped)
    stage = stopped / "out/layer_mask"
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "checkpoints/step-4")
    (stage / "checkpoints/latest").write_text("step-2\n")
    done = train(stopped, "--stage", "layer_mask")
    assert done.code == 0 and "resuming from step 2" in done.out, done
    maps = [
        torch.load(folder / "out/layer_mask/checkpoints/step-4/projections.pt", weights_only=True)
        for folder in (whole, stopped)
    ]
    assert set(maps[0]["weights"]) == set(HIDDEN)
    for name, weight in maps[0]["weights"].items():
        assert weight.shape == (48, 32) and torch.equal(weight, maps[1]["weights"][name])
    ours, theirs = (load_file(folder / "out/layer_mask/model/model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def opened(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, *settings: str) -> Any:
    monkeypatch.chdir(folder)
    stage = plan_stage(load_config("bmcook.json", settings), name)
    return stage, open_distillation(stage, open_inputs(stage))


def test_a_pair_means_the_same_block_in_a_model_whose_layers_are_numbered_anew(tmp_path, monkeypatch):
    pairs = [f"[post]model.layers.{i}.self_attn:[post]model.layers.{i}.self_attn" for i in range(3)]
    taught = {"teacher": "dense", "mse_att_scale": 1, "mse_att_module": [pairs[0], pairs[2]]}
    gone = {f"layers.1.{site}": torch.zeros(1) for site in ("att", "ffn")}
    write_stock_run(tmp_path, ("att_mask",), name="llama, tied", masks=gone, distillation=taught)
    source = tiny_source("llama, tied", vocab_size=304)
    prune_to_folder(source, source.adapter.space(source.config), {}, tmp_path / "dense")
    _, found = opened(tmp_path, "att_mask", monkeypatch)
    assert [str(pair) for pair in found.attention] == [
        pairs[0],
        "[post]model.layers.1.self_attn:[post]model.layers.2.self_attn",
    ]
    student, teacher = open_model(tmp_path / "model"), open_model(tmp_path / "dense")
    for pair in found.attention:
        own, its = (f"{place.path}.q_proj.weight" for place in pair)
        assert torch.equal(student.tensors[own], teacher.tensors[its])
    named = f"distillation.mse_att_module={json.dumps(pairs)}"
    with pytest.raises(UserError) as caught:
        opened(tmp_path, "att_mask", monkeypatch, named)
    assert f"mse_att_module: {pairs[1]}: the student's layer has been removed" in str(caught.value)
    assert pairs[0] not in str(caught.value) and pairs[2] not in str(caught.value)


def test_removed_blocks_are_told_before_anything_is_built(tmp_path):
    removed = [[False, False], [True, False], [True, True]]
    write_run(
        tmp_path,
        ("att_mask",),
        distillation=SELF,
        training__train_weights=False,
        fine__coarse_mask=None,
        model__config=MODEL | {"mask_modules": removed},
        model__path="small",
    )
    config = {**MODEL, "model_type": "cook_cpm_ant", "mask_modules": removed}
    write_model_folder(tmp_path / "small", ADAPTER, config, ADAPTER.build(config).named_parameters())
    done = train(tmp_path, "--stage", "att_mask")
    assert done.code == 2 and "Traceback" not in done.err, done
    for pair in ATTENTION[1:]:
        assert f"mse_att_module: {pair}: the student has no module" in done.err
    assert ATTENTION[0] not in done.err and not (tmp_path / "out/att_mask").exists()


def test_fixed_masks_stay_where_weights_have_been_trained_under_them(tmp_path, monkeypatch):
    names = ("layer_mask", "layer_finetune", "att_mask")
    write_frozen_run(tmp_path, names, distillation=SELF | {"stages": list(MASKS)})
    monkeypatch.chdir(tmp_path)
    config = load_config("bmcook.json")
    stages = {name: plan_stage(config, name) for name in names}
    assert [stage.adapted for stage in stages.values()] == [False, False, True]
    assert [stage.config.distillation is None for stage in stages.values()] == [False, True, False]
    same = plan_stage(load_config("bmcook.json", ['distillation.stages=["att_mask"]']), "att_mask")
    assert same.fingerprint() == stages["att_mask"].fingerprint()
    assert plan_stage(load_config("bmcook.json", ["distillation.ce_scale=2"]), "att_mask").fingerprint() != (
        same.fingerprint()
    )


def test_a_stage_outside_the_recipe_cannot_teach_itself_either(tmp_path, monkeypatch):
    write_frozen_run(tmp_path, ["att_mask"])
    config = {**MODEL, "model_type": "cook_cpm_ant"}
    write_model_folder(tmp_path / "dense", ADAPTER, config, ADAPTER.build(config).named_parameters())
    with pytest.raises(UserError, match=r"layer_mask \(it trains weights\)"):
        opened(tmp_path, "layer_mask", monkeypatch, "model.path=dense", "model.config=null")
