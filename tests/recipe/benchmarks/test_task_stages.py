"""Fine-tuning and pruning in stages, on one rank and on two: what is written, what stays, what is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from cook.families.encoder import open_encoder
from cook.recipe.benchmarks.task_stages import pruned_matrices
from cook.sparsity.matrices import encoder_matrices
from cook.sparsity.pattern_file import read_pattern_masks
from tests.recipe.benchmarks.tiny_task import (
    CONFIG,
    record,
    task,
    tasks,
    write_model,
    write_pairs,
    write_squad,
    write_sst2,
)
from tests.tiny_families import IDS, MORE_ENCODERS, SIZES

SST = {"task_name": "SST-2"}
TILES = SST | {"pruning_type": "8", "sparsities": "50 75"}
SQUAD = {"task_name": "SQuAD2.0", "output_dir": "squad", "max_length": "24", "doc_stride": "6"}
PHASES = ("before pruning", "after pruning", "after recovery")
STAGES = ("prune_tile_wise_kn/sparsity_50", "prune_tile_wise_kn/sparsity_75")

# Two ranks average half batches: fp32 sums in another order, which Adam's division by the gradient's own size enlarges
# where a gradient is near 0. Measured over 12 steps at a rate of 0.01: 5e-6. A key's bias moves all scores of a row
# alike, so its gradient is nothing but rounding, and Adam makes steps of any size of it: 1e-3.
CLOSE = 1e-4

CASES: dict[str, tuple[str, dict[str, str]]] = {
    "nothing to prune": ("prune", TILES),
    "nothing to export": ("export", TILES),
    "pretrain": ("pretrain", SST | {"model": "model", "epochs": "6"}),
    "pretrain again": ("pretrain", SST | {"model": "model", "epochs": "6"}),
    "pretrain otherwise": ("pretrain", SST | {"model": "model", "epochs": "5"}),
    "no trained head": ("prune", TILES | {"finetuned": "model"}),
    "granularity": ("prune", TILES | {"pruning_type": "2", "granularity": "24"}),
    "falling": ("prune", TILES | {"sparsities": "75 50"}),
    "quirk": ("prune", TILES | {"quirks": "revive,rev"}),
    "too long": ("prune", TILES | {"max_length": "64"}),
    "prune": ("prune", TILES),
    "export": ("export", TILES),
    "export in int8": ("export", TILES | {"int8": "true"}),
    "historical": ("prune", TILES | {"quirks": "historical", "finetuned": "out/pretrain/model", "output_dir": "all"}),
    "quirks": (
        "prune",
        TILES | {"quirks": "schedule_goes_on,drifting_weights", "finetuned": "out/pretrain/model", "output_dir": "old"},
    ),
    "two of four": ("prune", SST | {"pruning_type": "m4n2_1d", "sparsities": "50", "score": "magnitude"}),
    "distilled": (
        "prune",
        SST
        | {"pruning_type": "unstructured", "distillation": "1", "output_dir": "kd", "finetuned": "out/pretrain/model"},
    ),
    "undistilled": (
        "prune",
        SST | {"pruning_type": "unstructured", "output_dir": "plain", "finetuned": "out/pretrain/model"},
    ),
    "scores of pairs": ("pretrain", {"task_name": "STS-B", "output_dir": "sts", "model": "model", "epochs": "6"}),
    "two evaluations": (
        "pretrain",
        {"task_name": "MNLI", "output_dir": "mnli", "model": "model", "tensorboard": "true"},
    ),
    "other classes": ("prune", TILES | {"finetuned": "mnli/pretrain/model", "output_dir": "other"}),
    "ids beyond": ("pretrain", SST | {"model": "small", "output_dir": "small out"}),
    "squad": ("pretrain", SQUAD | {"model": "model"}),
    "squad prune": ("prune", SQUAD | {"pruning_type": "5"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_model(folder / "model")
    write_model(folder / "small", vocab_size=CONFIG["vocab_size"] - 2)
    write_sst2(folder / "data")
    write_squad(folder / "data", "2.0")
    write_pairs(folder / "data")
    return folder


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, dict[str, str]]:
    return tasks(folder, CASES)


def weights(*path: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(*path, "model", "model.safetensors"))


def masks(*path: str | Path) -> dict[str, torch.Tensor]:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights(*path).items()}
    return read_pattern_masks(Path(*path, "masks.safetensors"), encoder_matrices(shapes, head_size=16))[0]


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("nothing to prune", "no fine-tuned model to prune"),
        ("nothing to export", "no stage has finished"),
        ("pretrain otherwise", "finished with other settings"),
        ("no trained head", "no trained head for SST-2"),
        ("other classes", "contradiction, entailment, neutral, not 0, 1 (negative, positive)"),
        ("ids beyond", "token ids that the model lacks"),
        ("granularity", "24"),
        ("falling", "must increase"),
        ("quirk", "unknown name 'rev'"),
        ("too long", "larger than the model"),
        ("historical", "all its weights are pruned"),  # type 8 empties matrices of this size
    ],
)
def test_what_is_refused(told, case, error):
    assert error in told[case]["error"]


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_the_longest_row_is_what_the_stock_model_reads(family, folder, tmp_path):
    config = getattr(transformers, f"{family}Config")(**CONFIG)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    model.save_pretrained(tmp_path)
    for path in (folder / "model").glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    longest = open_encoder(str(tmp_path), "classes", ("negative", "positive"), seed=1).max_length
    assert longest > 40
    model(torch.full((1, longest), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 7))


def test_the_dense_model_learns_and_is_not_trained_twice(told, folder):
    assert told["pretrain"]["error"] == "" and "a new one is trained" in told["pretrain"]["out"]
    assert record(folder, "out/pretrain/done.json")["metrics"]["acc"] > 90.0
    assert "acc = " in (folder / "out/pretrain/eval_results.txt").read_text()
    assert "already finished" in told["pretrain again"]["out"]


@pytest.mark.parametrize("stage", STAGES)
def test_pruned_weights_are_exactly_zero_after_the_recovery(told, folder, stage):
    assert told["prune"]["error"] == ""
    found, kept = weights(folder, "out", stage), masks(folder, "out", stage)
    assert len(kept) == 12
    assert all(not found[name][~mask].any() for name, mask in kept.items())
    total = sum(mask.numel() for mask in kept.values())
    share = 1 - sum(int(mask.sum()) for mask in kept.values()) / total
    done = record(folder, "out", stage, "done.json")
    # One row tile of 16 columns on the smallest matrix is what a stage can miss.
    assert done["sparsity"] == pytest.approx(share) and abs(100 * share - done["asked_sparsity"]) < 100 * 16 / total + 2


def test_pruned_stays_pruned_and_the_recovery_trains_the_rest(told, folder):
    first, second = (masks(folder, "out", stage) for stage in STAGES)
    assert all((second[name] <= first[name]).all() for name in first)
    before, after = (weights(folder, "out", stage) for stage in STAGES)
    name = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.equal(before[name][second[name]], after[name][second[name]])


def test_what_a_stage_reports(told, folder):
    root = folder / "out" / "prune_tile_wise_kn"
    stages = record(root, "results.json")["stages"]
    assert [stage["asked_sparsity"] for stage in stages] == [50.0, 75.0]
    assert stages[1]["metrics"][PHASES[0]] == stages[0]["metrics"][PHASES[2]]
    assert stages[0]["metrics"][PHASES[0]] == record(folder, "out/pretrain/done.json")["metrics"]
    assert len(stages[0]["matrices"]) == 12 and stages[0]["matrices"][0]["role"] == "query"
    text = (root / "eval_results.txt").read_text()
    assert all(f"75%, {when}" in text for when in PHASES)
    assert "query.weight = " in (root / "sparsity.txt").read_text()
    report = (root / "report.md").read_text()
    assert "acc after recovery" in report and "| 75% " in report
    for figure in ("curve.png", "sparsity.png"):
        assert (root / figure).read_bytes().startswith(b"\x89PNG")
    log = [json.loads(line) for line in (root / "sparsity_75" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6, 6]
    assert log[5]["learning_rate"] == 0.0 < log[0]["learning_rate"]  # a full schedule of its own
    assert log[6]["after_recovery/acc"] == stages[1]["metrics"][PHASES[2]]["acc"]
    assert not (root / "sparsity_75" / "checkpoints").exists()


def test_the_export_is_smaller_and_computes_the_same(told, folder):
    assert told["export"]["error"] == ""
    found = record(folder, "out/prune_tile_wise_kn/export/export.json")
    assert found["parameters"]["after"] < found["parameters"]["before"]
    assert found["largest_relative_difference"] < 1e-5  # fp32: sums in another order
    assert "fp32" in found["difference_is_from"]
    assert found["speed_up_by_matrix"] and min(found["speed_up_by_matrix"].values()) > 0
    assert found["metrics"]["compact"] == found["metrics"]["masked"]
    stage = record(folder, "out", STAGES[1], "done.json")
    assert found["metrics"]["masked"] == stage["metrics"][PHASES[2]]


def test_the_export_in_int8_computes_about_the_same(told, folder):
    assert told["export in int8"]["error"] == ""
    found = record(folder, "out/prune_tile_wise_kn/export_int8/export.json")
    wide = record(folder, "out/prune_tile_wise_kn/export/export.json")
    assert found["int8"] and not wide["int8"] and found["parameters"] == wide["parameters"]
    assert 0 < found["largest_relative_difference"] < 0.1  # weights and activations of 8 bits
    assert "8 bits" in found["difference_is_from"]
    assert len(found["speed_up_by_matrix"]) == len(wide["speed_up_by_matrix"])
    assert found["metrics"]["compact"]["acc"] == pytest.approx(found["metrics"]["masked"]["acc"], abs=10)


def test_a_schedule_that_goes_on_is_a_quirk(told, folder):
    log = (folder / "old" / STAGES[0] / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [4, 5, 6, 6]  # after 3 scoring steps


def test_other_patterns_and_distillation(told, folder):
    assert told["two of four"]["error"] == told["distilled"]["error"] == ""
    for path in ("out/prune_m4n2_1d/sparsity_50", "kd/prune_unstructured/sparsity_50"):
        assert record(folder, path, "done.json")["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert "scores" not in told["two of four"]["out"]  # magnitude needs no gradients
    plain, distilled = (weights(folder, run, "prune_unstructured/sparsity_50") for run in ("plain", "kd"))
    assert not torch.equal(plain["classifier.weight"], distilled["classifier.weight"])


def test_regression_and_two_evaluation_sets(told, folder):
    assert told["scores of pairs"]["error"] == told["two evaluations"]["error"] == ""
    metrics = record(folder, "sts/pretrain/done.json")["metrics"]
    assert set(metrics) == {"pearson", "spearmanr", "corr"} and metrics["pearson"] > 50.0
    assert set(record(folder, "mnli/pretrain/done.json")["metrics"]) == {"acc", "acc-mm"}
    events = b"".join(path.read_bytes() for path in (folder / "mnli/pretrain/tensorboard").iterdir())
    assert b"fine-tuned/acc-mm" in events and b"train/loss" in events


def test_the_log_tells_first_of_the_rows_that_were_left_out(told, folder):
    first, second = map(json.loads, (folder / "mnli/pretrain/log.jsonl").read_text().splitlines()[:2])
    assert first.keys() == {"step", "data"} and first["step"] == 0 and second["step"] == 1
    files = [Path("data/MNLI", f"{name}.tsv") for name in ("train", "dev_matched", "dev_mismatched")]
    for told_of, file in zip(first["data"], files, strict=True):
        count = sum(line.endswith("\t-") for line in (folder / file).read_text().splitlines())
        assert count > 5 and f"{file}: left out: rows without a gold label: {count} (" in told_of


def test_squad(told, folder):
    assert told["squad"]["error"] == told["squad prune"]["error"] == ""
    stage = folder / "squad/prune_block_wise/sparsity_50"
    predictions, odds = record(stage, "predictions.json"), record(stage, "null_odds.json")
    assert len(predictions) == 12 and set(predictions) == set(odds) == set(record(stage, "nbest_predictions.json"))
    metrics = record(stage, "done.json")["metrics"][PHASES[2]]
    assert {"exact", "f1", "HasAns_f1", "NoAns_f1", "best_f1_thresh"} <= set(metrics)


@pytest.fixture(scope="module")
def again(told, folder, tmp_path_factory) -> dict[str, Any]:
    """The second stage lost its outcome, as a kill between masks and recovery leaves it, and a run on two ranks."""
    stage = folder / "out" / STAGES[1]
    before = {"weights": weights(stage), "masks": (stage / "masks.safetensors").read_bytes()}
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "model")
    two = {"two": ("prune", TILES | {"output_dir": "two", "finetuned": "out/pretrain/model"})}
    (folder / "old" / STAGES[0] / "masks.safetensors").write_bytes(before["masks"])
    told = tasks(folder, {"again": ("prune", TILES), "other masks": CASES["quirks"]}) | tasks(folder, two, ranks=2)
    return before | {"told": told}


def test_a_killed_stage_is_resumed(again, folder):
    told, stage = again["told"]["again"], folder / "out" / STAGES[1]
    assert told["error"] == "" and "50%: already finished" in told["out"]
    assert "scores" not in told["out"]  # the masks were there
    assert (stage / "masks.safetensors").read_bytes() == again["masks"]
    assert all(torch.equal(tensor, again["weights"][name]) for name, tensor in weights(stage).items())


def test_masks_that_were_written_over_are_noticed(again):
    assert "this is not the mask that tile_wise_kn 50% was trained with" in again["told"]["other masks"]["error"]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_prune_the_same(again, folder, stage):
    assert again["told"]["two"]["error"] == "" and "2 rank(s)" in again["told"]["two"]["out"]
    one, two = masks(folder, "out", stage), masks(folder, "two", stage)
    assert all(torch.equal(one[name], two[name]) for name in one)
    mine, other = weights(folder, "out", stage), weights(folder, "two", stage)
    assert max(float((mine[n] - other[n]).abs().max()) for n in mine if not n.endswith("key.bias")) < CLOSE
    metrics = [record(folder, run, stage, "done.json")["metrics"] for run in ("out", "two")]
    assert metrics[0] == metrics[1]


def test_the_command_ends_with_the_documented_codes(folder):
    result = task(folder, "prune", task_name="SST-3", epochs="0")
    assert result.code == 2 and "Traceback" not in result.err and "--epochs" in result.err
    result = task(folder, "pretrain", task_name="SST-3", model="model")
    assert result.code == 2 and "unknown GLUE task 'SST-3'" in result.err and "Traceback" not in result.err


ENDS = {
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "dense"),
    "electra": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    "modernbert": ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_matrices_of_encoders_with_other_names(name: str) -> None:
    fields = {key: value for key, value in {**SIZES, **IDS, **MORE_ENCODERS[name]}.items() if value is not None}
    config = transformers.CONFIG_MAPPING[fields.pop("model_type")](**fields)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    config.architectures = [type(model).__name__]
    matrices = pruned_matrices(SimpleNamespace(weights=dict(model.named_parameters()), config=config))
    assert [m.layer for m in matrices] == [layer for layer in range(3) for _ in ENDS[name]]
    for layer in range(3):
        own = [m.path for m in matrices if m.layer == layer]
        assert [path for path, end in zip(own, ENDS[name], strict=True) if not path.endswith(f"{end}.weight")] == []
