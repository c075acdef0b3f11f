"""The whole recipe on a tiny model, in both orders, from the corpus to the report."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cook.adapters.cpm_ant import ADAPTER
from cook.adapters.source import open_model
from cook.base.files import sha256
from cook.space.counts import unit_parameters
from tests.stages.tiny_run import MODEL, REPOSITORY, contents, do_prune, read_log, run, train, write_run

LAYERS, HEADS, DIMS = 3, 4, 24


def masks(folder: Path) -> dict[str, torch.Tensor]:
    """All three mask files, read as a stranger would."""
    read = {}
    for name in ("layer", "heads", "dimff"):
        read |= torch.load(folder / "out" / "masks" / f"{name}.pt", weights_only=True)
    return read


def done(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "out" / stage / "done.json").read_text())


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return dict(open_model(folder / "out" / stage / "model").tensors)


def test_the_layer_mask_ends_within_one_block_of_its_target(whole_run):
    found, space = masks(whole_run.folder), ADAPTER.space(MODEL)
    removed, sizes = 0, {}
    for key, site in (("self_att_layer_z", "att"), ("ffn_layer_z", "ffn")):
        assert found[key].shape == (LAYERS,) and set(found[key].tolist()) <= {0.0, 1.0}
        sizes[site] = unit_parameters(space, next(g for g in space.of("layer") if g.site == site))
        removed += sizes[site] * int((found[key] == 0).sum())
    assert found["cross_att_layer_z"].numel() == 0
    total = LAYERS * sum(sizes.values())
    assert abs(removed - 0.35 * total) < max(sizes.values()) and removed > 0


def test_every_kept_block_ends_with_exactly_its_heads_and_dims(whole_run):
    found = masks(whole_run.folder)
    assert found["heads_z"].sum(1).tolist() == [2.0] * int(found["self_att_layer_z"].sum())
    assert found["dimff_z"].sum(1).tolist() == [10.0] * int(found["ffn_layer_z"].sum())
    last = torch.load(whole_run.folder / "out" / "masks" / ("dimff.pt" if whole_run.stages[5] == "ffn_mask" else "heads.pt"))
    assert set(last) == {"heads_z", "dimff_z"}, "the fine mask learned last holds both"


def test_expected_sparsity_reaches_its_target_in_every_mask_stage(whole_run):
    for stage in ("layer_mask", "att_mask", "ffn_mask"):
        last = [record for record in read_log(whole_run.folder, stage) if "loss" in record][-1]
        for name, target in last["target_sparsity"].items():
            assert last["expected_sparsity"][name] == pytest.approx(target, abs=0.01), (stage, name)
            assert math.isfinite(last["lambda"][name])


def test_every_stage_logs_every_step_and_its_held_out_loss(whole_run):
    for stage in whole_run.stages:
        records = read_log(whole_run.folder, stage)
        assert [record["step"] for record in records if "loss" in record] == list(range(1, 7))
        assert records[-1]["held_out_loss"] == pytest.approx(done(whole_run.folder, stage)["held_out_loss"])
        assert all(record["grad_norm"] > 0 for record in records if "loss" in record), "no gradient norm was logged"
        board = whole_run.folder / "out" / stage / "tensorboard"
        assert board.is_dir() == (whole_run.stages[3] == "att_mask")


def test_a_stage_begins_where_the_one_before_it_ended(whole_run):
    folder = whole_run.folder
    for before, stage in zip(whole_run.stages[:-2], whole_run.stages[1:-1], strict=True):
        assert done(folder, stage)["follows"] == done(folder, before)["identity"]
        # Six steps of AdamW move no weight by more than the sum of its learning rates, so these follow each other.
        a, b = weights(folder, before), weights(folder, stage)
        assert all(0 < float((a[name] - b[name]).abs().max()) < 0.12 for name in a if not _is_dead(folder, stage, name))
    assert done(folder, "random_baseline")["follows"] == done(folder, "pretrain")["identity"]


def _is_dead(folder: Path, stage: str, name: str) -> bool:
    """Whether a weight belongs to a block that is pruned in a stage."""
    found = re.search(r"layers\.(\d+)\.(self_att|ffn)", name)
    if not found or stage in ("pretrain", "layer_mask"):
        return False
    layer = done(folder, stage)["structure"]["layers"][int(found[1])]
    return layer["att" if found[2] == "self_att" else "ffn"] is None


def test_pruned_units_get_no_gradient(whole_run):
    folder, found = whole_run.folder, masks(whole_run.folder)
    before, after = (weights(folder, stage) for stage in (whole_run.stages[5], whole_run.stages[6]))
    dead = [name for name in after if _is_dead(folder, "ffn_finetune", name)]
    assert dead and all(torch.equal(before[name], after[name]) for name in dead)
    rows = iter(found["heads_z"])
    for layer in torch.nonzero(found["self_att_layer_z"]).flatten().tolist():
        gone = (next(rows) == 0).repeat_interleave(8)
        for name, dim in (("project_q", 0), ("project_v", 0), ("attention_out", 1)):
            path = f"encoder.layers.{layer}.self_att.self_attention.{name}.weight"
            assert torch.equal(before[path].movedim(dim, 0)[gone], after[path].movedim(dim, 0)[gone])
            assert not torch.equal(before[path].movedim(dim, 0)[~gone], after[path].movedim(dim, 0)[~gone])


def test_the_random_baseline_has_the_shape_of_the_learned_model(whole_run):
    learned, baseline = (done(whole_run.folder, stage) for stage in (whole_run.stages[6], "random_baseline"))
    assert baseline["parameters"] == learned["parameters"]

    def sizes(record: dict[str, Any], site: str) -> list[int]:
        return [layer[site].count("1") for layer in record["structure"]["layers"] if layer[site]]

    assert sizes(baseline, "att") == sizes(learned, "att") and sizes(baseline, "ffn") == sizes(learned, "ffn")


def test_do_prune_writes_a_model_that_computes_the_same(whole_run):
    assert whole_run.pruned.code == 0, whole_run.pruned
    line = re.search(r"largest relative difference (\S+), equal to rounding", whole_run.pruned.out)
    assert line and float(line[1]) <= 1e-5
    assert "held-out text" in whole_run.pruned.out and "FLOPs a token" in whole_run.pruned.out
    small = open_model(whole_run.folder / "out" / "pruned")
    count = sum(tensor.numel() for tensor in small.tensors.values())
    assert count == done(whole_run.folder, whole_run.stages[6])["parameters"]
    found = masks(whole_run.folder)
    removed = [[bool(a), bool(f)] for a, f in zip(1 - found["self_att_layer_z"], 1 - found["ffn_layer_z"], strict=True)]
    assert small.config["mask_modules"] == removed and small.config["dim_ff"] == 10
    assert (whole_run.folder / "out" / "pruned" / "tokenizer.json").exists()


def test_a_second_start_finds_everything_finished(whole_run):
    before = contents(whole_run.folder)
    result = train(whole_run.folder, "--stage", "all")
    assert result.code == 0, result
    assert re.findall(r"(\w+): already finished", result.out) == list(whole_run.stages)
    assert contents(whole_run.folder) == before


def test_the_report_has_its_table_and_figures(whole_run):
    assert whole_run.reported.code == 0, whole_run.reported
    report = (whole_run.folder / "out" / "report" / "report.md").read_text()
    for title in ("dense", "layers, finetuned", "heads, finetuned", "dims, finetuned", "random masks"):
        assert title in report and title in whole_run.reported.out
    figures = re.findall(r"\]\(([^)]+\.png)\)", report)
    assert len(figures) == 3
    for figure in figures:
        content = (whole_run.folder / "out" / "report" / figure).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000


@pytest.fixture
def own_run(whole_run, tmp_path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(whole_run.folder, folder)
    return folder


def test_a_stage_that_was_redone_makes_the_later_ones_stale(own_run, whole_run):
    path = own_run / "out" / "layer_mask" / "done.json"
    path.write_text(path.read_text().replace('"identity": "', '"identity": "0'))
    result = train(own_run, "--stage", "all")
    assert result.code == 2 and "layer_mask has been redone since layer_finetune finished" in result.err, result
    assert "--stage layer_finetune --resume never" in result.err


def test_a_finished_stage_of_other_settings_is_an_error(own_run):
    result = train(own_run, "--stage", "all", "--set", "training.learning_rate=0.01")
    assert result.code == 2 and "pretrain finished with other settings" in result.err, result


def test_redoing_a_stage_gives_the_same_again(own_run, whole_run):
    before = sha256(own_run / "out" / "layer_mask" / "model" / "model.safetensors")
    result = train(own_run, "--stage", "layer_mask", "--resume", "never")
    assert result.code == 0, result
    assert sha256(own_run / "out" / "layer_mask" / "model" / "model.safetensors") == before
    assert train(own_run, "--stage", "all").code == 0, "the later stages are as good as before"


def test_models_in_every_form_give_the_same_reshaped_weights(whole_run, own_run, tmp_path):
    """An HF folder, a `.pt` with its JSON, a stage's checkpoints and one of them."""
    if whole_run.stages[3] != "att_mask":
        return
    source = open_model(own_run / "out" / "ffn_finetune" / "model")
    torch.save(dict(source.tensors), own_run / "live.pt")
    (own_run / "live.json").write_text(json.dumps({**MODEL, "dropout_p": 0.0}))
    checkpoints = own_run / "out" / "ffn_finetune" / "checkpoints"
    forms = [str(own_run / "out/ffn_finetune/model"), "live.pt", str(checkpoints), str(checkpoints / "step-6")]
    given = ["--coarse-mask", "out/masks/layer.pt", "--dimff-mask", "out/masks/dimff.pt"]  # which holds the heads too
    for number, form in enumerate(forms):
        result = do_prune(own_run, "--model", form, *given, "--output", f"small{number}")
        assert result.code == 0, result
        small = open_model(own_run / f"small{number}")
        expected = open_model(own_run / "out" / "pruned").tensors
        assert set(small.tensors) == set(expected)
        assert all(torch.equal(small.tensors[name], expected[name]) for name in expected), form
