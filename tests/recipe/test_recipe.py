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

from cook.base.errors import UserError
from cook.base.files import sha256
from cook.config.load import load_config
from cook.families.cpm_ant import ADAPTER
from cook.families.source import open_model
from cook.pruning.counts import unit_parameters
from cook.recipe.plan import Stage, plan_stage
from cook.recipe.runner import is_finished
from do_prune import main as do_prune_main
from tests.recipe.tiny_run import ATT_FIRST, MODEL, contents, read_log, train

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
    last = "dimff.pt" if whole_run.stages[5] == "ffn_mask" else "heads.pt"
    last = torch.load(whole_run.folder / "out" / "masks" / last)
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
    assert "held-out text" in whole_run.pruned.out and "FLOPs per token" in whole_run.pruned.out
    small = open_model(whole_run.folder / "out" / "pruned")
    count = sum(tensor.numel() for tensor in small.tensors.values())
    assert count == done(whole_run.folder, whole_run.stages[6])["parameters"]
    found = masks(whole_run.folder)
    removed = [[bool(a), bool(f)] for a, f in zip(1 - found["self_att_layer_z"], 1 - found["ffn_layer_z"], strict=True)]
    assert small.config["mask_modules"] == removed and small.config["dim_ff"] == 10
    assert (whole_run.folder / "out" / "pruned" / "tokenizer.json").exists()


def test_the_report_has_its_table_and_figures(whole_run):
    assert whole_run.reported.code == 0, whole_run.reported
    report = (whole_run.folder / "out" / "report" / "report.md").read_text()
    for title in ("dense", "layers, finetuned", "heads, finetuned", "dims, finetuned", "random masks"):
        assert title in report and title in whole_run.reported.out
    figures = re.findall(r"\]\(([^)]+\.png)\)", report)
    assert len(figures) == 4
    for figure in figures:
        content = (whole_run.folder / "out" / "report" / figure).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_a_second_start_finds_everything_finished(att_first):
    before = contents(att_first.folder)
    result = train(att_first.folder, "--stage", "all")
    assert result.code == 0, result
    assert re.findall(r"(\w+): already finished", result.out) == list(att_first.stages)
    assert contents(att_first.folder) == before


@pytest.fixture
def own_run(att_first, tmp_path, monkeypatch) -> Path:
    """A copy to change, and the working directory."""
    folder = tmp_path / "run"
    shutil.copytree(att_first.folder, folder)
    monkeypatch.chdir(folder)
    return folder


def planned(stage: str, *overrides: str) -> Stage:
    return plan_stage(load_config("bmcook.json", overrides), stage)


def test_a_stage_that_was_redone_makes_the_later_ones_stale(own_run):
    assert all(is_finished(planned(stage), "auto") for stage in ATT_FIRST)
    path = own_run / "out" / "layer_mask" / "done.json"
    path.write_text(path.read_text().replace('"identity": "', '"identity": "0'))
    with pytest.raises(UserError, match="layer_mask has been redone since layer_finetune finished") as caught:
        is_finished(planned("layer_finetune"), "auto")
    assert "--stage layer_finetune --resume never" in str(caught.value)
    assert is_finished(planned("random_baseline"), "auto") and not is_finished(planned("pretrain"), "never")


@pytest.mark.parametrize(
    "setting", ["training.learning_rate=0.01", "seed=4", "training.steps=7", "coarse-grained.target_sparsity=0.5"]
)
def test_a_finished_stage_of_other_settings_is_an_error(own_run, setting):
    with pytest.raises(UserError, match="layer_mask finished with other settings"):
        is_finished(planned("layer_mask", setting), "auto")


@pytest.mark.parametrize("setting", ["training.log_every=3", "training.save_every=2", "logging.tensorboard=false"])
def test_how_often_to_log_and_save_changes_nothing(own_run, setting):
    assert is_finished(planned("layer_mask", setting), "auto")


def test_redoing_a_stage_gives_the_same_again(own_run, att_first):
    before = sha256(own_run / "out" / "layer_mask" / "model" / "model.safetensors")
    result = train(own_run, "--stage", "layer_mask", "--resume", "never")
    assert result.code == 0, result
    assert sha256(own_run / "out" / "layer_mask" / "model" / "model.safetensors") == before
    assert is_finished(planned("layer_finetune"), "auto"), "the later stages are as good as before"


MASKS = "out/masks"
FINE = ("--coarse-mask", f"{MASKS}/layer.pt", "--heads-mask", f"{MASKS}/heads.pt", "--dimff-mask", f"{MASKS}/dimff.pt")


def prune(monkeypatch: pytest.MonkeyPatch, *options: str) -> int | None:
    """do_prune.py in this process: its start would cost more than its work."""
    monkeypatch.setattr("sys.argv", ["do_prune.py", *options])
    return do_prune_main()


@pytest.mark.parametrize(
    "form",
    [
        "out/ffn_finetune/model",
        "live.pt",
        "elsewhere",
        "out/ffn_finetune/checkpoints",
        "out/ffn_finetune/checkpoints/step-6",
    ],
)
def test_models_in_every_form_give_the_same_reshaped_weights(own_run, monkeypatch, form):
    expected, options = open_model(own_run / "out" / "pruned"), []
    if form in ("live.pt", "elsewhere"):
        torch.save(dict(open_model(own_run / "out" / "ffn_finetune" / "model").tensors), own_run / "live.pt")
        name = "live.json" if form == "live.pt" else "other.json"
        (own_run / name).write_text(json.dumps({**MODEL, "dropout_p": 0.0}))
        options = [] if form == "live.pt" else ["--model-config", name]
        form = "live.pt"
    assert prune(monkeypatch, "--model", form, *options, *FINE, "--output", "small") is None
    small = open_model(own_run / "small")
    assert set(small.tensors) == set(expected.tensors)
    assert all(torch.equal(small.tensors[name], expected.tensors[name]) for name in expected.tensors)
    assert [small.config[key] for key in MODEL] == [expected.config[key] for key in MODEL]


def test_one_file_may_hold_both_fine_masks(own_run, monkeypatch):
    assert prune(monkeypatch, "--model", "out/ffn_finetune/model", *FINE[:2], *FINE[4:], "--output", "small") is None
    small, expected = (dict(open_model(own_run / path).tensors) for path in ("small", "out/pruned"))
    assert {name: tensor.shape for name, tensor in small.items()} == {n: t.shape for n, t in expected.items()}


def test_fewer_masks_remove_less(own_run, monkeypatch):
    assert prune(monkeypatch, "--model", "out/layer_finetune/model", *FINE[:2], "--output", "small", "--verify") is None
    small = open_model(own_run / "small")
    assert sum(t.numel() for t in small.tensors.values()) == done(own_run, "layer_finetune")["parameters"]
    assert (own_run / "small" / "cpm_live.pt").exists(), "CPM-Live's format knows removed blocks"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "gone", *FINE, "--output", "small"), "no such model"),
        (("--model", "docs", *FINE, "--output", "small"), "no model in this folder"),
        (("--model", "out/ffn_finetune/model", "--output", "small"), "no masks to apply"),
        (("--model", "out/ffn_finetune/model", *FINE), "no output folder"),
        (("--model", "out/ffn_finetune/model", *FINE, "--output", "docs"), "does not contain a model"),
        (("--model", "out/ffn_finetune/model", *FINE, "--output", "out/ffn_finetune/model"), "overwrite the original"),
        (("--model", "out/ffn_finetune/model", "--coarse-mask", f"{MASKS}/heads.pt", "--output", "small"), "lacks"),
        (("--model", "out/ffn_finetune/model", *FINE[2:4], "--output", "small"), "does not fit"),
    ],
)
def test_mistakes_of_the_user_are_named_and_nothing_is_written(own_run, monkeypatch, options, message):
    before = contents(own_run)
    with pytest.raises(UserError, match=message):
        prune(monkeypatch, *options)
    assert contents(own_run) == before
