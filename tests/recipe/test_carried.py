"""A stage takes over the optimizer's state of the stage before."""

from __future__ import annotations

import shutil

import pytest
import torch

from cook.families import cpm_ant
from cook.families.source import open_model
from cook.pruning.mask_file import write_mask_file
from cook.pruning.mask_set import coarse_to_tensors
from tests.recipe.tiny_run import MODEL, read_log, train, write_run

STEADY = {"training__schedule": "constant", "training__warmup": 0.0, "training__steps": 4}


def all_open(folder):
    """A layer mask that keeps every block."""
    space = cpm_ant.ADAPTER.space(MODEL)
    write_mask_file(folder / "layer.pt", coarse_to_tensors(space, {g.name: torch.ones(1) for g in space.of("layer")}))


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    write_run(
        folder, ("pretrain", "layer_finetune"), coarse__coarse_mask="layer.pt", coarse__train_mask=False, **STEADY
    )
    all_open(folder)
    result = train(folder, "--stage", "all")
    assert result.code == 0, result
    return folder, result


def weights(folder, stage):
    return dict(open_model(folder / "out" / stage / "model").tensors)


def test_two_stages_of_four_steps_are_one_of_eight(two_stages, tmp_path):
    """A mask that removes nothing changes nothing, so that one long stage is an oracle for the whole of it."""
    folder, result = two_stages
    assert "layer_finetune: the optimizer resumes from pretrain" in result.out
    write_run(tmp_path, ("pretrain",), **STEADY | {"training__steps": 8})
    assert train(tmp_path, "--stage", "all").code == 0
    got, wanted = weights(folder, "layer_finetune"), weights(tmp_path, "pretrain")
    # The same operations in the same order.
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("zero", [1, 3])
def test_partitioned_state_is_taken_over_as_well(two_stages, tmp_path, zero):
    folder, _ = two_stages
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "out" / "layer_finetune")
    assert train(tmp_path, "--stage", "all", "--set", f"deepspeed.zero_optimization.stage={zero}").code == 0
    got, wanted = weights(tmp_path, "layer_finetune"), weights(folder, "layer_finetune")
    # fp32: the norm for clipping is summed over flat partitions in another order, over 4 steps of AdamW.
    assert all(torch.allclose(got[name], wanted[name], rtol=1e-4, atol=1e-5) for name in wanted)


def test_without_it_adam_starts_from_zero(two_stages, tmp_path):
    folder, _ = two_stages
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for change in ("switched off", "no checkpoint"):
        shutil.rmtree(tmp_path / "out" / "layer_finetune", ignore_errors=True)
        options = ["--set", "training.carry_optimizer=false"]
        if change == "no checkpoint":
            shutil.rmtree(tmp_path / "out" / "pretrain" / "checkpoints")
            options = []
        result = train(tmp_path, "--stage", "all", *options)
        assert result.code == 0, result
        assert ("left no checkpoint: the optimizer starts from zero" in result.out) is (change == "no checkpoint")
        losses = [
            [entry["loss"] for entry in read_log(at, "layer_finetune") if "loss" in entry] for at in (folder, tmp_path)
        ]
        assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


def test_masks_of_head_dims_are_among_those_that_the_stage_before_held(tmp_path):
    sizes = {"fine__target_head_dim": 4, "fine__head_dims_mask": "out/masks/head_dims.pt"}
    stages = ("pretrain", "layer_mask", "headdim_mask", "headdim_finetune", "ffn_mask")
    write_run(tmp_path, stages, **STEADY, **sizes, fine__allow_remote_code=True)
    result = train(tmp_path, "--stage", "all")
    assert result.code == 0 and "ffn_mask: the optimizer resumes from headdim_finetune" in result.out, result
