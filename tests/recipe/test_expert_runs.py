"""Whole runs on models with experts: `cook prune`, stages after one another, one budget, and ZeRO on two ranks."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.recipe.test_stock import write_stock_run
from tests.recipe.tiny_run import do_prune, read_log, run, train
from tests.text.test_hf import gpt2_like
from tests.tiny_families import given_config

SITES = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    "mlp.gate.weight",
    "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj",
)
SCHEME = {
    "pruning__pruned_module": [*SITES],
    "fine__dim_ff": 16,
    "fine__target_dimff": 8,
    "fine__target_experts": 3,
    "fine__experts_mask": "out/masks/experts.pt",
}


def write_mixtral_run(folder, stages, **changes):
    write_stock_run(folder, stages, name="mixtral", **(SCHEME | {"training__steps": 4} | changes))


def masks_of(folder, kind):
    key = {"experts": "experts_z", "dimff": "dimff_z"}[kind]
    return torch.load(folder / f"out/masks/{kind}.pt", weights_only=True)[key]


def test_one_command_prunes_a_folder_of_transformers_to_half_of_its_experts(tmp_path):
    # Layer 0 has a dense block of another size.
    changes = {"vocab_size": 304, "num_hidden_layers": 2, "num_local_experts": 4, "intermediate_size": 24}
    config = given_config("qwen3_moe", **changes)
    del config["num_experts"]
    stock = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.pop("model_type")](**config))
    stock.save_pretrained(tmp_path / "whole")
    gpt2_like(tmp_path / "whole")
    (tmp_path / "text.txt").write_text("\n".join(f"Line {n} has some words, {n * n} of them." for n in range(400)))
    options = ["--data", "text.txt", "--keep", "experts=0.5", "--output", "small", "--max-length", "24"]
    options += ["--steps", "6", "--finetune-steps", "2", "--batch-size", "2"]
    done = run([sys.executable, "-m", "cook", "prune", "whole", *options], tmp_path)
    assert done.code == 0 and "equal to rounding" in done.out, done
    assert "| 2 experts |" in done.out, "not the number of dims"
    assert "| active |" in done.out.replace("  ", " ") or "active" in done.out
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "small/model", output_loading_info=True)
    assert type(model) is type(stock) and not any(report.values())
    assert model.config.num_experts == 2 and model.model.layers[1].mlp.experts.down_proj.shape[0] == 2


def test_experts_and_then_their_dims_are_pruned_in_stages(tmp_path):
    write_mixtral_run(tmp_path, ("experts_mask", "ffn_mask", "ffn_finetune"))
    done = train(tmp_path, "--stage", "all")
    assert done.code == 0, done
    experts, dims = masks_of(tmp_path, "experts"), masks_of(tmp_path, "dimff")
    assert experts.sum(1).tolist() == [3.0] * 3 and dims.view(3, 5, 16).sum(2).eq(8).all()
    layers = json.loads((tmp_path / "out/ffn_finetune/done.json").read_text())["structure"]["layers"]
    assert [layer["experts"] for layer in layers] == ["".join(str(int(z)) for z in row) for row in experts.tolist()]
    pruned = do_prune(tmp_path, "--config", "bmcook.json", "--verify")
    assert pruned.code == 0 and "equal to rounding" in pruned.out and "trust_remote_code" not in pruned.out, pruned
    config = json.loads((tmp_path / "out/pruned/config.json").read_text())
    assert (config["num_local_experts"], config["intermediate_size"]) == (3, 8)


def test_experts_share_one_budget_with_heads(tmp_path):
    joint = {"joint": {"train_mask": True, "scope": "global", "target_params": 0.6}}
    more = {"fine__coarse_mask": "out/masks/layer.pt", "fine__allow_remote_code": True, "training__steps": 6}
    write_mixtral_run(tmp_path, ("joint_mask", "joint_finetune"), **more, **joint)
    done = train(tmp_path, "--stage", "all")
    assert done.code == 0, done
    experts = masks_of(tmp_path, "experts")
    assert experts.sum(1).min() >= 2 and experts.sum() < 15 and masks_of(tmp_path, "dimff").all()
    pruned = do_prune(tmp_path, "--config", "bmcook.json", "--verify")
    assert pruned.code == 0 and "equal to rounding" in pruned.out, pruned


@pytest.mark.parametrize("stages", [(0, 3), (1, 2)], ids=str)
def test_zero_on_two_ranks_is_plain_training(tmp_path, stages):
    """Gates in routers and on fused weights, trained together with the weights."""
    losses, masks, weights = [], [], []
    for name, stage, ranks in (("plain", 0, 0), *((str(stage), stage, 2) for stage in stages)):
        folder = tmp_path / name
        write_mixtral_run(
            folder, ("experts_mask", "ffn_mask"), deepspeed={"zero_optimization": {"stage": stage}}, training__steps=3
        )
        done = train(folder, "--stage", "all", ranks=ranks)
        assert done.code == 0, done
        losses.append([r["loss"] for s in ("experts_mask", "ffn_mask") for r in read_log(folder, s) if "loss" in r])
        masks.append(torch.cat([masks_of(folder, "experts").flatten(), masks_of(folder, "dimff").flatten()]))
        weights.append(load_file(folder / "out/ffn_mask/model/model.safetensors"))
    # Sums in another order, in fp32, and AdamW, which divides a gradient by its own size: the same on the same rows.
    for other in range(1, len(losses)):
        assert len(losses[0]) == 6 and losses[other] == pytest.approx(losses[0], rel=1e-4)
        assert torch.equal(masks[other], masks[0])
        assert all(float((weights[other][key] - w).abs().max()) < 1e-3 for key, w in weights[0].items())
