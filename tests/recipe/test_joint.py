"""Heads and dims (and blocks) learned in one stage, from the config files to the exported model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cook.base.files import sha256
from cook.families.cpm_ant import ADAPTER
from cook.families.source import open_model
from cook.pruning.counts import parameters, unit_parameters
from cook.pruning.mask_file import read_masks
from cook.pruning.mask_set import kept_counts
from tests.recipe.test_stock import write_stock_run
from tests.recipe.tiny_run import MODEL, REPOSITORY, do_prune, read_log, run, train, write_run

STAGES = ("pretrain", "joint_mask", "joint_finetune", "random_baseline")
PATHS = {kind: f"out/masks/{kind}.pt" for kind in ("layer", "heads", "dimff")}
SHARE = 0.5
REPORT = [sys.executable, "-m", "cook", "report", "--config", "bmcook.json"]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """A whole run with one budget for all heads and dims, half of their parameters."""
    folder = tmp_path_factory.mktemp("uneven")
    joint = {"train_mask": True, "scope": "global", "target_params": SHARE}
    write_run(folder, STAGES, joint=joint, pruning__mask_method="joint", training__save_every=4)
    trained = train(folder, "--stage", "all")
    assert trained.code == 0 and "learns heads and dimff masks" in trained.out, trained
    return folder


def files(folder: Path) -> dict[str, torch.Tensor]:
    return {key: z for path in PATHS.values() for key, z in torch.load(folder / path, weights_only=True).items()}


def done(folder: Path, stage: str) -> dict:
    return json.loads((folder / "out" / stage / "done.json").read_text())


def sizes(folder: Path, stage: str) -> dict[str, list[int]]:
    layers = done(folder, stage)["structure"]["layers"]
    return {site: sorted((layer[site] or "").count("1") for layer in layers) for site in ("att", "ffn")}


def test_uneven_blocks_share_one_budget(uneven):
    found, space = files(uneven), ADAPTER.space(MODEL)
    heads, dims = found["heads_z"].sum(1).tolist(), found["dimff_z"].sum(1).tolist()
    # Every row has something left: blocks without units are removed as a whole.
    assert len(heads) == found["self_att_layer_z"].sum() and len(dims) == found["ffn_layer_z"].sum()
    assert 0 not in heads + dims
    head, dim = (unit_parameters(space, space.of(kind)[0]) for kind in ("heads", "dimff"))
    whole = 3 * (4 * head + 24 * dim)
    assert abs(sum(heads) * head + sum(dims) * dim - SHARE * whole) <= head / 2
    assert len({*heads}) > 1 or len({*dims}) > 1 or len(heads + dims) < 6, "all blocks came out alike"
    last = [record for record in read_log(uneven, "joint_mask") if "loss" in record][-1]
    assert last["expected_sparsity"] == pytest.approx({"heads and dims": 1 - SHARE}, abs=0.01)


def test_later_stages_read_the_files(uneven):
    masks = {PATHS[kind]: sha256(uneven / PATHS[kind]) for kind in PATHS}
    assert done(uneven, "joint_mask")["masks"] == done(uneven, "joint_finetune")["masks"] == masks
    structures = [done(uneven, stage)["structure"] for stage in ("joint_mask", "joint_finetune")]
    assert structures[0] == structures[1]
    space = ADAPTER.space(MODEL)
    read = read_masks(space, **{"coarse" if kind == "layer" else kind: str(uneven / PATHS[kind]) for kind in PATHS})
    assert parameters(space, kept_counts(read)) == done(uneven, "joint_finetune")["parameters"]


def test_random_masks_copy_the_uneven_shape(uneven):
    assert sizes(uneven, "random_baseline") == sizes(uneven, "joint_finetune")
    assert done(uneven, "random_baseline")["parameters"] == done(uneven, "joint_finetune")["parameters"]
    assert done(uneven, "random_baseline")["structure"] != done(uneven, "joint_finetune")["structure"]


def test_the_exported_model_is_ragged_and_computes_the_same(uneven):
    pruned = do_prune(uneven, "--config", "bmcook.json", "--verify")
    assert pruned.code == 0 and "equal to rounding" in pruned.out, pruned
    config = json.loads((uneven / "out/pruned/config.json").read_text())
    found = files(uneven)
    gone = config["mask_modules"] or [[False] * 2] * 3
    heads, dims = config["layer_heads"] or [range(4)] * 3, config["layer_dim_ff"] or [config["dim_ff"]] * 3
    assert [not att for att, _ in gone] == found["self_att_layer_z"].tolist()
    assert [not ffn for _, ffn in gone] == found["ffn_layer_z"].tolist()
    assert [len(h) for h, (att, _) in zip(heads, gone, strict=True) if not att] == found["heads_z"].sum(1).tolist()
    assert [d for d, (_, ffn) in zip(dims, gone, strict=True) if not ffn] == found["dimff_z"].sum(1).tolist()
    record = torch.load(uneven / "out/pruned/masks/fine.pt", weights_only=True)
    assert all(torch.equal(record[key], found[key]) for key in ("heads_z", "dimff_z"))


def test_the_report_shows_uneven_blocks(uneven):
    reported = run(REPORT, uneven, PYTHONPATH=str(REPOSITORY))
    assert reported.code == 0, reported
    [row] = [line for line in reported.out.splitlines() if "| all, finetuned" in line]
    cells = [cell.strip() for cell in row.split("|")]
    for cell, kept in zip(cells[4:6], sizes(uneven, "joint_finetune").values(), strict=True):
        left = [number for number in kept if number]
        assert cell == ("–".join(map(str, sorted({left[0], left[-1]}))) if left else "–")
    assert (uneven / "out/report/structure.png").stat().st_size > 5000


def test_a_resumed_run_ends_with_the_same_masks(uneven, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uneven, folder)
    pointer = folder / "out" / "data.json"  # holds whole paths
    pointer.write_text(pointer.read_text().replace(str(uneven), str(folder)))
    shutil.rmtree(folder / "out/joint_mask/checkpoints/step-6")
    (folder / "out/joint_mask/done.json").unlink()
    for path in PATHS.values():
        (folder / path).write_bytes(b"not finished")
    result = train(folder, "--stage", "joint_mask")
    assert result.code == 0 and "resuming from step 4" in result.out, result
    assert [sha256(folder / path) for path in PATHS.values()] == [sha256(uneven / path) for path in PATHS.values()]


@pytest.fixture(scope="module")
def query_heads(tmp_path_factory) -> Path:
    """A run on a stock model whose query heads, keys and dims share one budget, and a stage after it."""
    folder = tmp_path_factory.mktemp("query_heads")
    write_stock_run(
        folder,
        ("joint_mask", "joint_finetune", "random_baseline"),
        name="llama, tied",
        fine__coarse_mask=PATHS["layer"],
        fine__allow_remote_code=True,
        training__steps=8,
        joint={"train_mask": True, "scope": "global", "target_params": 0.4},
    )
    trained = train(folder, "--stage", "all")
    assert trained.code == 0 and "trains the whole model" not in trained.out, trained
    return folder


def test_query_heads_are_chosen_from_their_groups(query_heads):
    heads = files(query_heads)["heads_z"].view(-1, 4, 2).sum(2)
    assert any(len(set(block.tolist()) - {0}) > 1 for block in heads), heads
    assert sizes(query_heads, "joint_finetune") == sizes(query_heads, "joint_mask")
    baseline = files_of_structure(query_heads, "random_baseline").view(-1, 4, 2).sum(2)
    assert sorted(sorted(b) for b in baseline.tolist()) == sorted(sorted(b) for b in heads.tolist())
    parameters_left = [done(query_heads, stage)["parameters"] for stage in ("joint_mask", "random_baseline")]
    source = open_model(query_heads / "model")
    space = source.adapter.space(source.config, "query_head")
    whole = sum(unit_parameters(space, group) * group.size for group in space.groups if group.kind != "layer")
    head, key = (unit_parameters(space, space.of(kind)[0]) for kind in ("heads", "keys"))
    assert parameters_left[0] == parameters_left[1]
    # Norms of blocks without units go too.
    gone = parameters(space) - parameters_left[0]
    assert 0 <= gone - 0.6 * whole + (head + key) / 2 <= head + key + 6 * 32


def files_of_structure(folder: Path, stage: str) -> torch.Tensor:
    rows = [layer["att"] for layer in done(folder, stage)["structure"]["layers"] if layer["att"]]
    return torch.tensor([[float(unit) for unit in row] for row in rows])


@pytest.mark.parametrize("more", [(), ("--uniform",)])
def test_query_heads_are_carried_out(query_heads, tmp_path, more):
    output = str(tmp_path / "small")
    pruned = do_prune(query_heads, "--config", "bmcook.json", "--verify", "--output", output, *more)
    assert pruned.code == 0 and "equal to rounding" in pruned.out, pruned
    assert ("trust_remote_code" in pruned.out) == (not more)
    small, report = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=not more, output_loading_info=True)
    assert not any(report.values())
    count = sum(p.numel() for p in small.parameters())
    assert count == done(query_heads, "joint_finetune")["parameters"] or more
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    wanted = small.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(small.generate(ids, max_new_tokens=6, do_sample=False), wanted)


def test_the_report_measures_query_heads(query_heads):
    reported = run(REPORT, query_heads, PYTHONPATH=str(REPOSITORY))
    assert reported.code == 0 and "| all, finetuned" in reported.out, reported


def test_key_value_groups_share_a_budget_of_flops(tmp_path):
    write_stock_run(
        tmp_path,
        ("joint_mask", "joint_finetune"),
        name="llama, tied",
        fine__coarse_mask=PATHS["layer"],
        fine__allow_remote_code=True,
        fine__head_unit="kv_group",
        training__steps=4,
        joint={"train_mask": True, "scope": "global", "target_flops": 0.3},
    )
    trained = train(tmp_path, "--stage", "all")
    assert trained.code == 0, trained
    heads = files(tmp_path)["heads_z"]
    assert heads.view(-1, 4, 2).sum(2).unique().tolist() in ([0, 2], [2])
    pruned = do_prune(tmp_path, "--config", "bmcook.json", "--verify")
    assert pruned.code == 0 and "equal to rounding" in pruned.out, pruned
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "pruned", trust_remote_code=True)
    assert sum(p.numel() for p in small.parameters()) == done(tmp_path, "joint_finetune")["parameters"]


def test_blocks_heads_and_dims_each_meet_their_target(uneven, tmp_path):
    write_run(tmp_path, ("joint_mask",), joint={"train_mask": True, "target_sparsity": 0.35})
    bmcook = json.loads((tmp_path / "bmcook.json").read_text())
    bmcook["model"] = {"type": "cpm_ant", "path": str(uneven / "out/pretrain/model")}
    (tmp_path / "bmcook.json").write_text(json.dumps(bmcook))
    trained = train(tmp_path, "--stage", "joint_mask")
    assert trained.code == 0 and "learns layer and heads and dimff masks" in trained.out, trained
    found, att, ffn = files(tmp_path), 4 * 32 * 32 + 32, 3 * 32 * 24 + 32
    removed = att * int((found["self_att_layer_z"] == 0).sum()) + ffn * int((found["ffn_layer_z"] == 0).sum())
    assert abs(removed - 0.35 * 3 * (att + ffn)) <= att / 2
    assert found["heads_z"].sum(1).tolist() == [2.0] * int(found["self_att_layer_z"].sum())
    assert found["dimff_z"].sum(1).tolist() == [10.0] * int(found["ffn_layer_z"].sum())
