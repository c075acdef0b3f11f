"""The stage moefy: its plan, whole runs with masks before it and a teacher, resume, ranks, and the command."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from cook.base.errors import UserError
from cook.cli import invoke
from cook.config.load import load_config
from cook.config.moefy import MoefyJob
from cook.families.source import load_model, open_model
from cook.models.cook_experts import routers
from cook.pruning.mask_file import write_mask_file
from cook.recipe.dry_run import plan_facts
from cook.recipe.moefy import open_dense
from cook.recipe.moefy_job import write_moefy_recipe
from cook.recipe.one_line import base_recipe
from cook.recipe.plan import MaskPaths, plan_stage, recipe
from cook.recipe.summary import masks_after
from tests.recipe.test_stock import write_stock_run
from tests.recipe.tiny_run import do_prune, read_log, train, write_run
from tests.text.test_hf import gpt2_like

EXPERTS = {"is_moefy": True, "experts": 4, "shared": 1, "active": 0.5, "calibration_steps": 2}


@pytest.mark.parametrize(
    ("stages", "held"),
    [
        (("pretrain",), {}),
        (("layer_mask",), {"layer": "layer"}),
        (("layer_finetune", "ffn_mask"), {"layer": "layer", "dimff": "dimff"}),
        (("ffn_mask", "ffn_finetune"), {"layer": "layer", "heads": "heads", "dimff": "dimff"}),
    ],
)
def test_it_follows_the_masks_of_the_stage_before_it(tmp_path, monkeypatch, stages, held):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, (*stages, "moefy"), MoEfication=EXPERTS)
    (tmp_path / "out/masks").mkdir(parents=True)
    if len(held) == 3:  # a mask of another unit is applied if its file exists
        (tmp_path / "out/masks/heads.pt").touch()
    *_, stage = recipe(load_config("bmcook.json"))
    assert stage.fixed == MaskPaths(**{kind: f"out/masks/{name}.pt" for kind, name in held.items()})
    assert stage.after == stages[-1] and masks_after(stage) == MaskPaths()


def test_the_plan_checks_the_names_of_the_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_stock_run(tmp_path, ("moefy",), MoEfication=EXPERTS | {"first_FFN_module": ["mlp.c_fc"]})
    config = load_config("bmcook.json")
    with pytest.raises(UserError, match=re.escape("first_FFN_module: 'mlp.c_fc' is not the first product")):
        plan_facts(config, recipe(config), world_size=1)
    config = load_config("bmcook.json", ["MoEfication.first_FFN_module=[]"])
    [row] = plan_facts(config, recipe(config), world_size=1)["stages"]
    assert row["learns"] == ["routers"]
    with pytest.raises(UserError, match="moefy needs the section"):
        plan_stage(load_config("bmcook.json", ["stages=[]", "MoEfication.is_moefy=false"]), "moefy")


@pytest.mark.parametrize("masked_dims", ["remove", "route"])
def test_masked_dims_are_removed_or_routed(tmp_path, monkeypatch, masked_dims):
    monkeypatch.chdir(tmp_path)
    changes = {"MoEfication": EXPERTS | {"masked_dims": masked_dims}, "fine__target_num_heads": 8}
    write_stock_run(
        tmp_path, ("layer_finetune", "ffn_mask", "moefy"), fine__coarse_mask="out/masks/layer.pt", **changes
    )
    # As if the stages before had finished: layer 1 is gone, and half of the dims of the others.
    shutil.copytree("model", "out/ffn_mask/model")
    (tmp_path / "out/ffn_mask/done.json").write_text("{}")
    stays = torch.tensor([1.0, 0.0, 1.0])
    layers = {"self_att_layer_z": stays, "cross_att_layer_z": torch.empty(0), "ffn_layer_z": stays.clone()}
    write_mask_file("out/masks/layer.pt", layers)
    rows = torch.stack([torch.arange(20) % 2, torch.arange(20) < 10]).float()
    write_mask_file("out/masks/dimff.pt", {"dimff_z": rows})
    *_, stage = recipe(load_config("bmcook.json"))
    inputs = open_dense(stage)
    assert inputs.fixed == {} and inputs.space.num_layers == 2
    sizes = {group.name: group.size for group in inputs.space.of("dimff")}
    if masked_dims == "remove":
        assert sizes == {"layers.0.dimff": 10, "layers.1.dimff": 10} and inputs.preferred == {}
    else:
        assert sizes == {"layers.0.dimff": 20, "layers.1.dimff": 20}
        assert all(torch.equal(inputs.preferred[name], row) for name, row in zip(sizes, rows, strict=True))
    [_, last] = load_file("model/model.safetensors")["model.layers.2.mlp.down_proj.weight"].split([31, 1])
    kept = last[:, :10] if masked_dims == "remove" else last
    assert torch.equal(inputs.weights["model.layers.1.mlp.down_proj.weight"][31:], kept)


def tiny_folder(folder):
    """A Llama that transformers saved, with a tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=304, **sizes)).save_pretrained(folder / "llama")
    gpt2_like(folder / "llama")
    return folder / "llama"


def test_the_command_writes_its_recipe_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    tiny_folder(tmp_path)
    job = MoefyJob(model="llama", output="small", data=("docs",), experts=8, shared=3, steps=2, max_length=40)
    path, facts = write_moefy_recipe(job)
    config = load_config(path)
    assert config.moefy.steps == 2 and config.distillation.teacher == "llama" and facts["stages"][0]["steps"] == 2
    write_moefy_recipe(job)
    with pytest.raises(UserError, match="has the recipe of another job"):
        write_moefy_recipe(MoefyJob(model="llama", output="small", data=("docs",), experts=4, max_length=40))


def test_a_model_of_experts_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8}
    config = Qwen3MoeConfig(vocab_size=304, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes)
    Qwen3MoeForCausalLM(config).save_pretrained("experts")
    gpt2_like(tmp_path / "experts")
    with pytest.raises(UserError, match="no dense FFN blocks"):
        write_moefy_recipe(MoefyJob(model="experts", output="small", data=("docs",), max_length=40))
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_the_command_makes_a_stock_model_without_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    tiny_folder(tmp_path)
    options = ["--data", "docs", "--max-length", "40", "--calibration-steps", "2", "--shared", "3"]
    invoke("moefy", ["llama", "small", *options])
    printed = capsys.readouterr().out
    assert "equal to rounding" in printed and "trust_remote_code" not in printed
    assert re.search(r"\| small/model +\| +40.4k \| +34.3k \| +5.\d+ \|", printed), printed
    config = json.loads((tmp_path / "small/model/config.json").read_text())
    assert config["model_type"] == "glm4_moe" and config["num_experts_per_tok"] == 1
    card = (tmp_path / "small/model/README.md").read_text()
    assert "mixtures of experts" in card and "which uses 34.3k parameters" in card
    dense, made = load_file("llama/model.safetensors"), load_file("small/run/moefy/model/model.safetensors")
    order = load_file("small/run/moefy/experts.safetensors")["layers.0.dimff.order"]
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(made[up].float(), dense[up][order].to(made[up].dtype).float())  # reordered, not trained
    model = load_model(open_model("small/run/moefy/model"))
    for router in routers(model):
        router.active = router.routed
    ids = torch.randint(304, (2, 9))
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained("llama", dtype=torch.float32)(ids).logits
        # The stage ran in bf16 where the processor has it, and a weight of 8 bits is rounded once.
        torch.testing.assert_close(model(ids).logits, wanted, rtol=2e-2, atol=2e-3)


@pytest.mark.slow
def test_the_pruned_model_gets_experts_and_a_resumed_run_ends_the_same(tmp_path):
    folder, copy = tmp_path / "stopped", tmp_path / "whole"
    changes = {"MoEfication": EXPERTS, "fine__target_num_heads": 8, "training__steps": 4, "training__save_every": 2}
    changes["distillation"] = {"teacher": "model", "ce_scale": 1.0, "stages": ["moefy"]}
    write_stock_run(folder, ("ffn_mask", "moefy"), **changes)
    assert train(folder, "--stage", "ffn_mask").code == 0
    shutil.copytree(folder, copy)
    failed = train(folder, "--stage", "moefy", COOK_FAULT_POINT="save.done:0")
    assert failed.code == -9, failed
    for each in (folder, copy):
        done = train(each, "--stage", "moefy")
        assert done.code == 0 and "trains a mixture of experts" in done.out, done
        assert ("resuming from step 2" in done.out) == (each is folder)
    ends = [load_file(each / "out/moefy/model/model.safetensors") for each in (folder, copy)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert ends[0]["model.layers.1.mlp.gate_proj.weight"].shape == (10, 32)  # 10 of 20 dims, in 4 experts
    record = json.loads((folder / "out/moefy/done.json").read_text())
    # Of 10 dims, 4 are shared and 2 are in each of 3 routed experts, of which 1 is active: 4 dims of 3 · 32 + 2 rest.
    assert record["parameters"] - record["active_parameters"] == 3 * 4 * (3 * 32 + 2)
    assert record["dense_held_out_loss"] > 0 and len([r for r in read_log(folder, "moefy") if "loss" in r]) == 4
    first = load_file(folder / "out/moefy/experts.safetensors")
    weight = "model.layers.0.mlp.router.weight"
    assert not torch.equal(ends[0][weight], first["layers.0.dimff.weight"])  # the router was trained
    pruned = do_prune(folder, "--config", "bmcook.json", "--verify")
    assert pruned.code == 0 and "equal to rounding" in pruned.out and "active per token" in pruned.out, pruned
    assert open_model(folder / "out/pruned").adapter.experts(open_model(folder / "out/pruned").config)


@pytest.mark.slow
def test_every_zero_stage_trains_the_same_experts(tmp_path):
    losses = []
    for stage, ranks in ((0, 0), (1, 2), (2, 2), (3, 2)):
        folder = tmp_path / f"{stage}-{ranks}"
        engine = {"zero_optimization": {"stage": stage}}
        write_stock_run(folder, ("moefy",), MoEfication=EXPERTS, training__steps=3, deepspeed=engine)
        done = train(folder, "--stage", "all", ranks=ranks)
        assert done.code == 0, done
        losses.append([record["loss"] for record in read_log(folder, "moefy") if "loss" in record])
        losses[-1].append(json.loads((folder / "out/moefy/done.json").read_text())["held_out_loss"])
    # Sums in another order, in fp32: the same model on the same rows.
    assert len(losses[0]) == 4 and all(own == pytest.approx(losses[0], rel=1e-4) for own in losses)


def test_the_vocabulary_of_a_model_of_several_parts_is_that_of_its_text(tmp_path):
    """Gemma 3 with images has no `vocab_size` of its own."""
    (tmp_path / "a.txt").write_text("text")
    job = MoefyJob(model="model", output=str(tmp_path / "out"), data=(str(tmp_path / "a.txt"),))
    parts = {"text_config": {"vocab_size": 61}, "vision_config": {"hidden_size": 16}}
    source = SimpleNamespace(path=tmp_path / "model", config=parts)
    assert base_recipe(job, source, 1)["tokenizer"]["vocab_size"] == 61
