"""Nested masks of several sizes for one set of weights, from the config files to the exported models."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cook.base.files import sha256
from cook.families.cpm_ant import ADAPTER
from cook.pruning.counts import unit_parameters
from tests.recipe.tiny_run import MODEL, REPOSITORY, do_prune, read_log, run, train, write_run

SIZES = (0.75, 0.5, 0.3)
STAGES = ("pretrain", "joint_mask", "joint_finetune")
PATH = {"PYTHONPATH": str(REPOSITORY)}
REPORT = [sys.executable, "-m", "cook", "report", "--config", "bmcook.json"]


def path(kind: str, size: float) -> str:
    return f"out/masks/{kind}-{size:g}.pt"


FILES = [path(kind, size) for kind in ("layer", "heads", "dimff") for size in SIZES]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of three sizes whose weights are trained; the largest teaches the others."""
    folder = tmp_path_factory.mktemp("sizes")
    joint = {"train_mask": True, "scope": "global", "target_params": list(SIZES)}
    write_run(
        folder,
        STAGES,
        joint=joint,
        distillation={"teacher": "self", "ce_scale": 0.5},
        pruning__mask_method="joint",
        training__save_every=4,
    )
    trained = train(folder, "--stage", "all")
    assert trained.code == 0 and "joint_mask: the largest size is the teacher of the others" in trained.out, trained
    return folder


def units(folder: Path, size: float) -> dict[str, torch.Tensor]:
    """The units of every layer as 0 and 1, `[layers, units]`, from the files alone."""
    blocks = torch.load(folder / path("layer", size), weights_only=True)
    found = {}
    for kind, block, count in (("heads", "self_att_layer_z", 4), ("dimff", "ffn_layer_z", 24)):
        rows = torch.load(folder / path(kind, size), weights_only=True)[f"{kind}_z"]
        found[kind] = torch.zeros(3, count)
        found[kind][blocks[block] == 1] = rows
    return found


def done(folder: Path, stage: str) -> dict:
    return json.loads((folder / "out" / stage / "done.json").read_text())


def test_masks_are_nested_and_each_size_meets_its_budget(finished):
    found, space = [units(finished, size) for size in SIZES], ADAPTER.space(MODEL)
    for large, small in itertools.pairwise(found):
        assert all(bool((small[kind] <= large[kind]).all()) for kind in small)
    head, dim = (unit_parameters(space, space.of(kind)[0]) for kind in ("heads", "dimff"))
    for size, kept in zip(SIZES, found, strict=True):
        assert (
            abs(kept["heads"].sum() * head + kept["dimff"].sum() * dim - size * 3 * (4 * head + 24 * dim)) <= head / 2
        )


def test_every_stage_records_every_size(finished):
    for stage in STAGES[1:]:
        record = done(finished, stage)
        models = record["sizes"]
        assert [model["size"] for model in models] == list(SIZES)
        assert record["structure"] == models[0]["structure"] and record["held_out_loss"] == models[0]["held_out_loss"]
        assert all(model["held_out_loss"] > 0 for model in models)
        assert [model["parameters"] for model in models] == sorted((m["parameters"] for m in models), reverse=True)
        assert record["masks"] == {name: sha256(finished / name) for name in FILES}
        last = read_log(finished, stage)[-1]
        assert last["held_out_loss_of_size"] == {f"{m['size']:g}": pytest.approx(m["held_out_loss"]) for m in models}
    assert (
        done(finished, "joint_mask")["sizes"][2]["structure"]
        == done(finished, "joint_finetune")["sizes"][2]["structure"]
    )
    targets = [r for r in read_log(finished, "joint_mask") if "target_sparsity" in r][-1]["target_sparsity"]
    assert targets == {f"heads and dims, {size:g}": pytest.approx(1 - size) for size in SIZES}


def test_each_size_can_be_cut_and_computes_what_its_masks_compute(finished):
    one = do_prune(finished, "--config", "bmcook.json", "--size", "0.5", "--verify", "--output", "small")
    assert one.code == 0 and one.out.count("equal to rounding") == 1, one
    every = do_prune(finished, "--config", "bmcook.json", "--verify")
    assert every.code == 0 and every.out.count("equal to rounding") == 3, every
    for size, record in zip(SIZES, done(finished, "joint_finetune")["sizes"], strict=True):
        folders = [finished / "out" / "pruned" / f"{size:g}"] + [finished / "small"] * (size == 0.5)
        for folder in folders:
            small = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            assert sum(p.numel() for p in small.parameters()) == record["parameters"]
    wrong = do_prune(finished, "--config", "bmcook.json", "--size", "0.6")
    assert wrong.code == 2 and "wanted: 0.75, 0.5, 0.3" in wrong.err and "Traceback" not in wrong.err, wrong


def test_the_report_has_a_row_per_size(finished):
    reported = run(REPORT, finished, **PATH)
    assert reported.code == 0, reported
    rows = [line.split("|")[1].strip() for line in reported.out.splitlines() if "| all, finetuned" in line]
    assert rows == [f"all, finetuned, {size:g}" for size in SIZES]


def again(finished: Path, folder: Path, stage: str) -> Path:
    """A copy of the run in which this stage and the later ones have not begun."""
    shutil.copytree(finished, folder)
    pointer = folder / "out" / "data.json"  # holds whole paths
    pointer.write_text(pointer.read_text().replace(str(finished), str(folder)))
    for name in STAGES[STAGES.index(stage) :]:
        (folder / "out" / name / "done.json").unlink()
    return folder


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_resumed_stage_ends_with_the_same_masks_and_weights(finished, tmp_path, stage):
    folder = again(finished, tmp_path / "run", stage)
    shutil.rmtree(folder / "out" / stage / "checkpoints" / "step-6")
    result = train(folder, "--stage", stage)
    assert result.code == 0 and "resuming from step 4" in result.out, result
    assert [sha256(folder / name) for name in FILES] == [sha256(finished / name) for name in FILES]
    weights = f"out/{stage}/model/model.safetensors"
    assert sha256(folder / weights) == sha256(finished / weights)


def test_finetuning_without_the_units_that_no_size_keeps_is_the_same(finished, tmp_path):
    folder = again(finished, tmp_path / "run", "joint_finetune")
    shutil.rmtree(folder / "out" / "joint_finetune")
    result = train(folder, "--stage", "joint_finetune", "--set", "training.remove_masked=false")
    assert result.code == 0, result
    for whole, cut in zip(*(done(f, "joint_finetune")["sizes"] for f in (folder, finished)), strict=True):
        # The sums have fewer terms; six steps of Adam carry the difference on.
        assert cut["held_out_loss"] == pytest.approx(whole["held_out_loss"], rel=1e-4)
        assert cut["structure"] == whole["structure"]
    states = [
        next((f / "out/joint_finetune/checkpoints").glob("step-6/*/mp_rank_00_model_states.pt"))
        for f in (folder, finished)
    ]
    assert states[0].stat().st_size > 1.05 * states[1].stat().st_size


def test_two_ranks_train_the_sizes_that_one_rank_does(finished, tmp_path):
    folder = again(finished, tmp_path / "run", "joint_mask")
    for stage in STAGES[1:]:
        shutil.rmtree(folder / "out" / stage)
    result = train(folder, "--stage", "joint_mask", ranks=2)
    assert result.code == 0, result
    for two, one in zip(done(folder, "joint_mask")["sizes"], done(finished, "joint_mask")["sizes"], strict=True):
        # Sums of gradients are in another order; six steps of Adam carry the difference on.
        assert two["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=1e-4)
        assert two["structure"] == one["structure"]


def test_frozen_weights_learn_nested_masks_from_the_dense_model(finished, tmp_path):
    folder = again(finished, tmp_path / "run", "joint_mask")
    for stage in STAGES[1:]:
        shutil.rmtree(folder / "out" / stage)
    settings = ("training.train_weights=false", 'distillation.stages=["joint_mask"]')
    options = [part for setting in settings for part in ("--set", setting)]
    result = train(folder, "--stage", "joint_mask", *options)
    assert result.code == 0 and "the model is its own teacher, with all masks open" in result.out, result
    found = [units(folder, size) for size in SIZES]
    assert all(bool((s[kind] <= b[kind]).all()) for b, s in itertools.pairwise(found) for kind in s)


def test_the_plan_has_every_size(finished):
    plan = run([sys.executable, "-m", "cook", "plan", "--json", "--config", "bmcook.json"], finished, **PATH)
    assert plan.code == 0, plan
    for row in json.loads(plan.out)["stages"][1:]:
        sizes = row["parameters_of_sizes"]
        assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True) and row["parameters_after"] == sizes[0]
    made = [model["parameters"] for model in done(finished, "joint_finetune")["sizes"]]
    assert sizes == made  # the finetuning's masks exist already
