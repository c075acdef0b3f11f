"""Stages that leave the means of removed units as a bias, from the config files to the exported model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.recipe.test_stock import STREAM, write_stock_run
from tests.recipe.tiny_run import do_prune, read_log, train

STAGES = ("joint_mask", "joint_finetune")
HIDDEN_UNITS = {"fine__target_hidden": 24, "pruning__pruned_module": [*STREAM]}


def write(folder: Path, stages=STAGES, *, frozen=("joint_mask",), **changes) -> None:
    """A run whose stages in `frozen` do not train weights."""
    defaults = {
        "gates": {"compensation": True, "start_steps": 2},
        "joint": {"train_mask": True},
        "fine__coarse_mask": "out/masks/layer.pt",
        "training__save_every": 3,
        "training__learning_rate": 0.0,
    }
    write_stock_run(folder, stages, name="llama, tied", **(defaults | changes))
    config = json.loads((folder / "bmcook.json").read_text())
    for stage in config["stages"]:
        stage["training"] = {"train_weights": stage["name"] not in frozen}
    (folder / "bmcook.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Masks of heads and dims learned with fixed weights, and a finetuning that does not move them."""
    folder = tmp_path_factory.mktemp("finished")
    write(folder)
    done = train(folder, "--stage", "all")
    assert done.code == 0, done
    return folder


def record(folder: Path, stage: str) -> dict:
    return json.loads((folder / "out" / stage / "done.json").read_text())


def test_the_written_model_has_the_loss_of_the_compensated_one(finished):
    masks, finetuned = record(finished, "joint_mask"), record(finished, "joint_finetune")
    # The gates mix means in; the small model has them in its biases. fp32, sums in another order.
    assert masks["held_out_loss"] == pytest.approx(finetuned["held_out_loss"], rel=1e-5)
    before, after = (
        load_file(finished / "model/model.safetensors"),
        load_file(finished / "out/joint_mask/model/model.safetensors"),
    )
    added = after.keys() - before.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {key for key in added if after[key].any()} == {
        f"model.layers.{n}.{name}.bias" for n in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")
    }


def test_one_budget_over_all_units_has_the_same_loss_once_they_are_removed(tmp_path):
    masks = {f"fine__{kind}_mask": f"out/masks/{kind}.pt" for kind in ("head_dims", "hidden")}
    joint = {"train_mask": True, "scope": "global", "blocks": True, "target_params": 0.6}
    write(tmp_path, joint=joint, fine__target_head_dim=4, fine__allow_remote_code=True, **masks, **HIDDEN_UNITS)
    done = train(tmp_path, "--stage", "all")
    assert done.code == 0, done
    records = record(tmp_path, "joint_mask"), record(tmp_path, "joint_finetune")
    assert records[0]["held_out_loss"] == pytest.approx(records[1]["held_out_loss"], rel=1e-5)
    pruned = do_prune(tmp_path, "--config", "bmcook.json", "--verify")
    assert pruned.code == 0 and "equal to rounding" in pruned.out, pruned


def test_the_pruned_model_is_a_stock_llama_with_biases(finished, tmp_path):
    done = do_prune(finished, "--config", "bmcook.json", "--verify", "--output", str(tmp_path / "small"))
    assert done.code == 0 and "equal to rounding" in done.out, done
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(report.values()) and type(model).__name__ == "LlamaForCausalLM"
    assert model.config.attention_bias and model.config.mlp_bias and model.config.intermediate_size == 10


def test_a_resumed_stage_has_the_same_means(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    pointer = folder / "out" / "data.json"  # holds whole paths
    pointer.write_text(pointer.read_text().replace(str(finished), str(folder)))
    stage = folder / "out/joint_mask"
    kept = (stage / "model/model.safetensors").read_bytes()
    shutil.rmtree(stage / "checkpoints/step-6")
    shutil.rmtree(stage / "model")
    (stage / "done.json").unlink()
    result = train(folder, "--stage", "joint_mask")
    assert result.code == 0 and "resuming from step 3" in result.out, result
    assert (stage / "model/model.safetensors").read_bytes() == kept
    # Stopped after the last checkpoint and before the model was written: no step is left to run.
    shutil.rmtree(stage / "model")
    (stage / "done.json").unlink()
    again = train(folder, "--stage", "joint_mask")
    assert again.code == 0 and "resuming from step 6" in again.out, again
    assert (stage / "model/model.safetensors").read_bytes() == kept


def test_two_ranks_under_zero_3_find_the_same_means(finished, tmp_path):
    write(tmp_path, ("joint_mask",), deepspeed={"zero_optimization": {"stage": 3}})
    done = train(tmp_path, "--stage", "all", ranks=2)
    assert done.code == 0, done
    one, two = (load_file(f / "out/joint_mask/model/model.safetensors") for f in (finished, tmp_path))
    assert one.keys() == two.keys()
    for key in one:  # sums of two ranks in another order, in fp32
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)
    losses = [[r["loss"] for r in read_log(f, "joint_mask") if "loss" in r] for f in (finished, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_heads_and_then_dims_with_weights_that_are_trained(tmp_path):
    stages = ("att_mask", "att_finetune", "ffn_mask", "ffn_finetune")
    write(tmp_path, stages, training__learning_rate=0.002, fine__coarse_mask=None)
    done = train(tmp_path, "--stage", "all")
    assert done.code == 0, done
    biases = {
        stage: load_file(tmp_path / f"out/{stage}/model/model.safetensors")["model.layers.1.mlp.down_proj.bias"]
        for stage in ("att_finetune", "ffn_mask")
    }
    assert biases["ffn_mask"].norm() > 2 * biases["att_finetune"].norm(), "the means of dims were added"
    pruned = do_prune(tmp_path, "--config", "bmcook.json", "--verify")
    assert pruned.code == 0 and "equal to rounding" in pruned.out, pruned


@pytest.mark.parametrize(
    ("stages", "changes", "words"),
    [
        (("att_mask", "ffn_mask"), {"distillation": {"teacher": "self"}}, "the teacher of the second mask stage"),
        (
            ("joint_mask",),
            {"joint": {"train_mask": True, "scope": "global", "target_params": [0.8, 0.5]}},
            "each of several sizes would need biases of its own",
        ),
    ],
)
def test_what_one_bias_cannot_hold_is_refused(stages, changes, words, tmp_path):
    write(tmp_path, stages, frozen=stages, **changes)
    done = train(tmp_path, "--stage", "all")
    assert done.code == 2 and words in done.err and "Traceback" not in done.err, done
    assert not (tmp_path / "out").exists()


def test_a_family_without_biases_is_refused(tmp_path):
    write_stock_run(tmp_path, ("ffn_mask",), name="qwen3", gates={"compensation": True})
    done = train(tmp_path, "--stage", "all")
    assert done.code == 2 and "gates.compensation needs output projections with a bias" in done.err, done
    assert "Qwen3" in done.err and "Traceback" not in done.err
