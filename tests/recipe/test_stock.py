"""The whole path on a Hugging Face folder: masks learned, finetuned, applied; a stock folder at the end."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cook.base.errors import UserError
from cook.config.load import load_config
from cook.export.pruned_folder import prune_to_folder
from cook.pruning.mask_file import read_mask_file
from cook.recipe.inputs import make_gates, open_inputs
from cook.recipe.plan import plan_stage
from tests.recipe.tiny_run import REPOSITORY, do_prune, read_log, run, train, write_run
from tests.text.test_hf import gpt2_like
from tests.tiny_families import tiny_source

SITES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
STAGES = ("att_mask", "ffn_mask", "ffn_finetune")


def write_stock_run(folder, stages=STAGES, *, name="llama", masks=None, **changes):
    """A tiny model of the family in `folder/model`, masks carried out, and both config files for it."""
    source = tiny_source(name, vocab_size=304)
    prune_to_folder(source, source.adapter.space(source.config), masks or {}, folder / "model")
    gpt2_like(folder / "model")
    defaults = {
        "model": {"type": "hf", "path": "model"},
        "tokenizer": {"type": "hf", "path": "model", "vocab_size": 301},
        "pruning__pruned_module": [f"{site}.weight" for site in SITES],
        "fine__coarse_mask": None,
        "fine__num_heads": 8,
        "fine__dim_ff": 20,
        "fine__target_num_heads": 4,
        "fine__target_dimff": 10,
        "training__learning_rate": 0.002,
    }
    write_run(folder, stages, **(defaults | changes))


def test_a_llama_is_pruned_to_a_smaller_llama(tmp_path):
    write_stock_run(tmp_path, fine__head_unit="query_head")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 2}')
    done = train(tmp_path, "--stage", "all")
    assert done.code == 0, done
    # 2 FLOPs per weight and token forward and 4 backward, of the model without the removed units; attention is small.
    [small] = [record for record in read_log(tmp_path, "ffn_finetune") if record.get("step") == 6 and "loss" in record]
    weights = json.loads((tmp_path / "out/ffn_finetune/done.json").read_text())["parameters"]
    assert 6 * weights * 0.9 < small["flops_per_second"] / small["tokens_per_second"] < 6 * weights * 1.4
    assert "flops_utilisation" not in small, "the peak of this processor is not known"
    rows = read_mask_file(tmp_path / "out/masks/heads.pt", required=("heads_z",), allowed=("heads_z",))["heads_z"]
    assert rows.shape == (3, 8) and rows.view(3, 4, 2).sum(2).eq(1).all()
    pruned = do_prune(tmp_path, "--config", "bmcook.json", "--verify")
    assert pruned.code == 0 and "equal to rounding" in pruned.out, pruned
    assert "trust_remote_code" not in pruned.out
    small = tmp_path / "out" / "pruned"
    config = json.loads((small / "config.json").read_text())
    sizes = {"num_key_value_heads": 4, "num_attention_heads": 4, "head_dim": 6, "intermediate_size": 10}
    assert sizes.items() <= config.items()
    model, report = AutoModelForCausalLM.from_pretrained(small, output_loading_info=True)
    assert not any(report.values())
    ids = AutoTokenizer.from_pretrained(small)("import os", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    assert json.loads((small / "generation_config.json").read_text())["eos_token_id"] == 2
    card = (small / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert "warning: CTranslate2" in pruned.out and "Warning: CTranslate2" in card  # 4 heads of 6 features, 32 in all


def test_a_ragged_model_frozen_under_zero_3_on_two_ranks(tmp_path):
    losses = []
    for stage, ranks in ((3, 2), (0, 0)):
        folder = tmp_path / str(stage)
        write_stock_run(
            folder,
            ("att_mask",),
            name="llama, tied",
            masks={"layers.1.att": torch.zeros(1)},
            deepspeed={"zero_optimization": {"stage": stage}},
            training__train_weights=False,
            training__steps=2,
        )
        assert "auto_map" in json.loads((folder / "model/config.json").read_text())
        done = train(folder, "--stage", "all", ranks=ranks)
        assert done.code == 0, done
        before, after = (load_file(folder / f"{at}/model.safetensors") for at in ("model", "out/att_mask/model"))
        assert before.keys() == after.keys() and all(torch.equal(after[name], w) for name, w in before.items())
        assert json.loads((folder / "out/att_mask/done.json").read_text())["structure"]["layers"][1]["att"] is None
        losses.append([record["loss"] for record in read_log(folder, "att_mask") if "loss" in record])
    # Sums in another order, in fp32: the same model on the same rows.
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)


STREAM = (*(f"{site}.weight" for site in SITES), "embed_tokens.weight")
HIDDEN = {"fine__target_hidden": 24, "fine__hidden_mask": "out/masks/hidden.pt", "pruning__pruned_module": [*STREAM]}


@pytest.mark.parametrize("kind", ["staged", "joint"])
def test_the_hidden_size_of_a_llama_is_learned(tmp_path, kind):
    stages = ("ffn_mask", "hidden_mask", "hidden_finetune") if kind == "staged" else ("joint_mask", "joint_finetune")
    joint = {"joint": {"train_mask": True, "scope": "global", "target_params": 0.5}} if kind == "joint" else {}
    more = {"fine__coarse_mask": "out/masks/layer.pt", "fine__allow_remote_code": True} if joint else {}
    write_stock_run(
        tmp_path, stages, name="llama, tied", training__steps=6, fine__round_to=2, **HIDDEN, **more, **joint
    )
    done = train(tmp_path, "--stage", "all")
    assert done.code == 0 and "trains the whole model" not in done.out, done
    mask = torch.load(tmp_path / "out/masks/hidden.pt", weights_only=True)["hidden_z"]
    record = json.loads((tmp_path / "out" / stages[-1] / "done.json").read_text())
    assert record["structure"]["hidden"] == "".join(str(int(z)) for z in mask.tolist())
    pruned = do_prune(tmp_path, "--config", "bmcook.json", "--verify")
    assert pruned.code == 0 and "equal to rounding" in pruned.out, pruned
    config = json.loads((tmp_path / "out/pruned/config.json").read_text())
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out/pruned", trust_remote_code=kind == "joint")
    left = sum(p.numel() for p in small.parameters())
    kept = int(mask.sum())
    assert small.get_input_embeddings().weight.shape[1] == kept and left == record["parameters"]
    if kind == "staged":
        assert config["model_type"] == "llama" and config["hidden_size"] == kept == 24
    else:
        whole = sum(w.numel() for w in load_file(tmp_path / "model/model.safetensors").values())
        # Two hidden dimensions at once are the largest step.
        assert abs(left - whole / 2) <= left / kept + 1 and kept % 2 == 0


HEAD_DIMS = {"fine__target_head_dim": 4, "fine__head_dims_mask": "out/masks/head_dims.pt"}


@pytest.mark.parametrize("kind", ["staged", "joint"])
def test_the_size_of_the_heads_of_a_llama_is_learned(tmp_path, kind):
    stages, joint = ("headdim_mask", "headdim_finetune"), {}
    if kind == "joint":
        stages = ("joint_mask", "joint_finetune")
        joint = {"train_mask": True, "scope": "global", "target_params": 0.5, "blocks": True, "pin": ["heads"]}
        joint = {"joint": joint, "fine__coarse_mask": "out/masks/layer.pt", "fine__allow_remote_code": True, **HIDDEN}
    write_stock_run(tmp_path, stages, name="llama, tied", training__steps=6, **HEAD_DIMS, **joint)
    done = train(tmp_path, "--stage", "all")
    assert done.code == 0 and "trains the whole model" not in done.out, done
    mask = torch.load(tmp_path / "out/masks/head_dims.pt", weights_only=True)["head_dims_z"]
    record = json.loads((tmp_path / "out" / stages[-1] / "done.json").read_text())
    assert mask.shape == (3,) and record["structure"]["head_dims"] == "".join(str(int(z)) * 2 for z in mask.tolist())
    pruned = do_prune(tmp_path, "--config", "bmcook.json", "--verify")
    assert pruned.code == 0 and "equal to rounding" in pruned.out, pruned
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out/pruned", trust_remote_code=kind == "joint")
    left = sum(p.numel() for p in small.parameters())
    assert left == record["parameters"]
    if kind == "staged":
        assert small.config.model_type == "llama" and small.config.head_dim == 4
    else:
        whole = sum(w.numel() for w in load_file(tmp_path / "model/model.safetensors").values())
        assert abs(left - whole / 2) <= 0.05 * whole
        assert not (tmp_path / "out/masks/heads.pt").exists()
        # Where attention is left, it has all of its heads.
        assert {layer["att"] for layer in record["structure"]["layers"]} <= {None, "1" * 8}
        drawn = json.loads((tmp_path / "out" / stages[0] / "gates.json").read_text())
        assert {"blocks", "dimff", "head_dims", "hidden"} == {group["kind"] for group in drawn["groups"]}
        report = run(
            [sys.executable, "-m", "cook", "report", "--config", "bmcook.json"], tmp_path, PYTHONPATH=str(REPOSITORY)
        )
        assert report.code == 0 and "| head dims" in report.out, report


def test_a_size_of_heads_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    write_stock_run(tmp_path, ("headdim_mask",), name="llama, tied", **(HEAD_DIMS | {"fine__target_head_dim": 3}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="target_head_dim: not possible"):
        open_inputs(plan_stage(load_config("bmcook.json"), "headdim_mask"))


def test_a_hidden_size_that_no_stock_class_loads_is_named(tmp_path, monkeypatch):
    write_stock_run(tmp_path, ("hidden_mask",), name="llama, tied", **(HIDDEN | {"fine__target_hidden": 20}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="target_hidden: no stock class can load this hidden size"):
        open_inputs(plan_stage(load_config("bmcook.json"), "hidden_mask"))
    allowed = load_config("bmcook.json", ["fine-grained.allow_remote_code=true"])
    assert [group.name for group in open_inputs(plan_stage(allowed, "hidden_mask")).learned] == ["hidden"]


def test_hidden_dims_need_all_matrices_on_the_stream_to_be_named(tmp_path):
    write_stock_run(tmp_path, ("hidden_mask",), **(HIDDEN | {"pruning__pruned_module": [*STREAM[:-1]]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        config = load_config("bmcook.json")
        with pytest.raises(UserError, match="pruned_module leaves no units of kind 'hidden'"):
            open_inputs(plan_stage(config, "hidden_mask"))


def plant_a_useless_layer(folder, number):
    """Makes a layer of `folder/model` add nothing, and fits the last product to the corpus, so that others matter."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, weight in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            weight.data *= 0.0 if f"layers.{number}." in name else 5.0
    text = "\n".join(path.read_text() for path in sorted((folder / "docs").iterdir()))
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder / "model")(text)["input_ids"])
    ids = ids[: len(ids) // 40 * 40].view(-1, 40)[:200]
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    optimizer = torch.optim.Adam([model.lm_head.weight], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:].flatten()).backward()
        optimizer.step()
    model.save_pretrained(folder / "model")


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_search_finds_the_layer_that_does_nothing(tmp_path, ranks):
    write_stock_run(
        tmp_path,
        ("layer_mask",),
        gates={"start": "search", "start_steps": 2},
        coarse__unit="layer",
        coarse__target_sparsity=0.3,
        deepspeed={"zero_optimization": {"stage": 3 if ranks else 0}},
        training__train_weights=False,
        training__steps=2,
        training__save_every=1,
    )
    plant_a_useless_layer(tmp_path, 1)
    done = train(tmp_path, "--stage", "all", ranks=ranks)
    assert done.code == 0, done
    mask = torch.load(tmp_path / "out/masks/layer.pt", weights_only=True)
    assert mask["self_att_layer_z"].tolist() == mask["ffn_layer_z"].tolist() == [1, 0, 1]
    logged = [record["expected_sparsity"]["blocks"] for record in read_log(tmp_path, "layer_mask") if "loss" in record]
    assert logged == pytest.approx([1 / 3] * 2)
    if ranks:
        return
    pruned = do_prune(tmp_path, "--config", "bmcook.json", "--verify")
    assert pruned.code == 0 and "equal to rounding" in pruned.out and "trust_remote_code" not in pruned.out, pruned
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "pruned").config.num_hidden_layers == 2
    # A resumed stage has the gates of its checkpoint, and does not search again.
    (tmp_path / "out/layer_mask/done.json").unlink()
    shutil.rmtree(tmp_path / "out/layer_mask/checkpoints/step-2")
    resumed = train(tmp_path, "--stage", "all")
    assert resumed.code == 0 and "resuming from step 1" in resumed.out, resumed
    assert torch.equal(
        torch.load(tmp_path / "out/masks/layer.pt", weights_only=True)["ffn_layer_z"], mask["ffn_layer_z"]
    )


def test_a_search_is_for_blocks_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_stock_run(tmp_path, gates={"start": "search"})
    stage = plan_stage(load_config("bmcook.json"), "att_mask")
    with pytest.raises(UserError, match='"search" is for stages that learn blocks alone'):
        make_gates(stage, open_inputs(stage))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"fine__target_num_heads": 3},
            ["target_num_heads", "2, 4, 8 (whole key-value groups)", "4, 8 (the same number"],
        ),
        ({"fine__target_num_heads": 6}, ["target_num_heads", "allow_remote_code"]),
        ({"fine__target_num_heads": 2, "fine__head_unit": "query_head"}, ["wanted: 4, 8"]),
        ({"fine__num_heads": 4}, ["fine-grained.num_heads", "8"]),
        ({"model": {"type": "hf"}}, ["model.path"]),
        ({"model": {"type": "hf", "path": "x.pt"}}, ["model.path"]),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    write_stock_run(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        open_inputs(plan_stage(load_config("bmcook.json"), "att_mask"))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "choice", "remote", "unit"),
    [
        (4, "auto", False, "kv_group"),
        (4, "query_head", False, "query_head"),
        (2, "auto", False, "kv_group"),
        (6, "auto", True, "kv_group"),
    ],
)
def test_the_unit_follows_from_the_target(tmp_path, monkeypatch, target, choice, remote, unit):
    monkeypatch.chdir(tmp_path)
    write_stock_run(tmp_path, fine__target_num_heads=target, fine__head_unit=choice, fine__allow_remote_code=remote)
    stage = plan_stage(load_config("bmcook.json"), "att_mask")
    inputs = open_inputs(stage)
    gates = make_gates(stage, inputs)
    assert inputs.head_unit == unit and sum(gates.sizes.values()) == (12 if unit == "kv_group" else 24)
    masks = gates.binary()
    for group in inputs.learned:
        kept = masks[group.name].view(group.sections, -1).sum(1)
        assert (kept * group.members).sum() == target and len(set(kept.tolist())) == 1


def test_an_encoder_is_no_model_for_this_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_stock_run(tmp_path, name="bert", fine__num_heads=4)
    with pytest.raises(UserError, match="BERT is not a causal language model"):
        open_inputs(plan_stage(load_config("bmcook.json"), "att_mask"))
