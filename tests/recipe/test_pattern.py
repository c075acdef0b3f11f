from __future__ import annotations

import json
import shutil
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

from cook.base.errors import UserError
from cook.config.load import load_config
from cook.config.schema import load_schema
from cook.families.cpm_ant import ADAPTER
from cook.recipe.inputs import open_inputs
from cook.recipe.pattern import pattern_masks
from cook.recipe.plan import plan_stage
from cook.sparsity.matrices import matrices_of, restricted
from cook.sparsity.pattern_file import read_pattern_masks
from cook.sparsity.spec import NAMES, NUMBERED, Quirks
from tests.recipe.tiny_run import MODEL, SITES, read_log, train, write_run

PATTERN = {"type": 8, "sparsity": 62.5, "granularity": 8, "scoring_steps": 3, "score": "taylor"}
MASK = "out/masks/pattern.safetensors"
CONFIG = {"model_type": "cook_cpm_ant", **{key: value for key, value in MODEL.items() if key != "half"}}


def pattern_run(folder, **changes):
    stages = ("pretrain", "pattern")
    # Without the scheme's file: a pattern needs none.
    settings = {"pruning__mask_method": "pattern", "pruning__pruning_mask_path": MASK, "pattern": PATTERN}
    settings |= {"training__weight_decay": 0.3, "training__steps": 4, "deepspeed__zero_optimization__stage": 2}
    write_run(folder, stages, **{**settings, **changes})
    (folder / "l0_pruning.json").unlink()


def masks_and_weights(folder, mask=MASK):
    matrices = restricted(matrices_of(ADAPTER.space(CONFIG)), [f"{site}.weight" for site in SITES], ADAPTER.aliases)
    masks, record = read_pattern_masks(folder / mask, matrices)
    return masks, record, load_file(folder / "out" / "pattern" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pattern")
    pattern_run(folder)
    result = train(folder, "--stage", "all")
    assert result.code == 0, result
    return folder, result


def test_a_language_model_is_pruned_in_a_pattern_and_finetuned(finished):
    folder, result = finished
    masks, record, weights = masks_and_weights(folder)
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert 1 - kept / total == pytest.approx(0.625, abs=4.5 / total)
    assert record["pattern"]["type"] == 8 and "tile_wise_kn, 62.5" in result.out
    for path, mask in masks.items():
        assert (weights[path][~mask] == 0).all(), path
        assert not mask.any() or float(weights[path][mask].abs().min()) > 0
    start = load_file(folder / "out" / "pretrain" / "model" / "model.safetensors")
    path = next(path for path, mask in masks.items() if mask.any())
    assert float((weights[path] - start[path])[masks[path]].abs().max()) > 0, "it has not been finetuned"
    assert [r["step"] for r in read_log(folder, "pattern") if "loss" in r] == [1, 2, 3, 4]
    done = json.loads((folder / "out" / "pattern" / "done.json").read_text())
    assert list(done["masks"]) == [MASK]


def test_it_is_resumed_with_the_mask_that_it_made(finished):
    folder, _ = finished
    before = (folder / MASK).read_bytes()
    (folder / "out" / "pattern" / "done.json").unlink()
    result = train(folder, "--stage", "pattern")
    assert result.code == 0 and "resuming from step 4" in result.out and "scores" not in result.out, result
    assert (folder / MASK).read_bytes() == before


def masks_of(folder, *overrides, anew=False):
    """The masks of the pattern stage with changed settings, made in this process: magnitudes need no training."""
    stage = plan_stage(load_config("bmcook.json", overrides), "pattern")
    resume = "never" if anew else "auto"
    return pattern_masks(stage, open_inputs(stage), None, None, lambda step, phase: None, resume)


def test_a_mask_of_other_settings_is_not_taken(finished, monkeypatch):
    monkeypatch.chdir(finished[0])
    with pytest.raises(UserError, match="mask was made with other settings"):
        masks_of(finished[0], "pattern.sparsity=70")


def test_a_mask_that_the_run_made_is_made_anew_when_it_starts_over(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(folder)
    changes = ("pattern.sparsity=70", "pattern.score=magnitude")
    for name in ("out/masks/again.safetensors", "given.safetensors"):
        shutil.copyfile(MASK, name)
    masks = masks_of(folder, "pruning.pruning_mask_path=out/masks/again.safetensors", *changes, anew=True)
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert 1 - kept / total == pytest.approx(0.7, abs=4.5 / total)
    # One outside the output folder was given to the run: it is never written over.
    with pytest.raises(UserError, match="mask was made with other settings"):
        masks_of(folder, "pruning.pruning_mask_path=given.safetensors", *changes, anew=True)


def test_a_second_stage_starts_from_the_first_ones_mask(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(folder)
    first = masks_and_weights(folder)[0]
    second = masks_of(
        folder,
        "pruning.pruning_mask_path=out/masks/second.safetensors",
        f"pattern.previous_mask={MASK}",
        "pattern.sparsity=80",
        "pattern.score=magnitude",
    )
    assert all(not bool((second[path] & ~first[path]).any()) for path in first)
    kept, total = sum(int(m.sum()) for m in second.values()), sum(m.numel() for m in second.values())
    assert 1 - kept / total == pytest.approx(0.8, abs=4.5 / total)


@pytest.mark.parametrize("method", ["m4n2_1d", "m4n2_2d"])
def test_two_of_four_needs_no_section(finished, monkeypatch, method):
    monkeypatch.chdir(finished[0])
    path = f"out/masks/{method}.safetensors"
    overrides = (f"pruning.mask_method={method}", f"pruning.pruning_mask_path={path}", "pattern=null")
    masks = masks_of(finished[0], *overrides)
    for mask in masks.values():
        assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
        assert method == "m4n2_1d" or (mask.unflatten(0, (-1, 4)).sum(1) == 2).all()
    again = masks_of(finished[0], *overrides)
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())


def test_what_fits_no_matrix_is_told_before_anything_else(finished, monkeypatch):
    monkeypatch.chdir(finished[0])
    with pytest.raises(UserError, match="matches no matrix"):
        masks_of(finished[0], 'pruning.pruned_module=["norm.weight"]')


def test_the_schema_knows_the_same_patterns_and_quirks():
    node = load_schema("bmcook")["properties"]["pattern"]["properties"]
    assert node["type"]["enum"] == [*range(len(NUMBERED)), *NAMES]
    assert node["quirks"]["items"]["enum"] == [field.name for field in fields(Quirks)]


def test_a_quantize_stage_keeps_the_pruned_weights_at_zero(finished, tmp_path):
    pytest.importorskip("torchao")
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    config = json.loads((folder / "bmcook.json").read_text())
    config["stages"].append({"name": "quantize"})
    config["quantization"] = {"is_quant": True, "scheme": "int8_weight", "steps": 2}
    (folder / "bmcook.json").write_text(json.dumps(config))
    result = train(folder, "--stage", "quantize")
    assert result.code == 0, result
    masks, _, before = masks_and_weights(folder)
    after = load_file(folder / "out" / "quantize" / "model" / "model.safetensors")
    for path, mask in masks.items():
        assert (after[path][~mask] == 0).all() and not torch.equal(after[path], before[path]), path
