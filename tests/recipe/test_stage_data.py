"""Sources of a real run: weights that follow losses, streams, and a run that resumes with both."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from cook.data.order import updated_weights
from cook.report.events import TIMES
from tests.recipe.tiny_run import read_log, train, write_run

REFERENCE = {"code": 2.0, "small": 4.5}


def write_sources(folder: Path, **options: object) -> None:
    """A run on functions of the library, and on a source so small that its epochs end all the time."""
    members = [inspect.getsource(f) for m in (shutil, subprocess) for _, f in inspect.getmembers(m, inspect.isfunction)]
    folder.mkdir(parents=True)
    (folder / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in members))
    lines = [json.dumps({"text": f"row {n} of a small source {n}"}) + "\n" for n in range(9)]
    (folder / "small.jsonl").write_text("".join(lines))
    sources = [
        {"type": "jsonl", "paths": [f"{name}.jsonl"], "name": name, "weight": weight, **options}
        for name, weight in (("code", 1), ("small", 1))
    ]
    data = {
        "sources": sources,
        "max_length": 40,
        "held_out": 0.25,
        "ledger": True,
        "mixing": {"every": 4, "reference": REFERENCE, "rows": 4},
    }
    often = {"training__steps": 14, "training__save_every": 5, "training__keep_checkpoints": 3}
    write_run(folder, ("pretrain",), data=data, **often)


@pytest.fixture(scope="module", params=["prepared", "streamed"])
def finished(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    write_sources(folder, streaming=request.param == "streamed")
    result = train(folder, "--stage", "pretrain")
    assert result.code == 0, result
    assert "epoch 2 of the source small begins" in result.out
    return folder


def ledger(folder: Path, rank: int = 0) -> dict[int, list[str]]:
    lines = (folder / "out" / "pretrain" / f"ledger-{rank}.jsonl").read_text().splitlines()
    return {line["step"]: line["samples"] for line in map(json.loads, lines)}


def untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(folder, "pretrain")]


def test_weights_follow_the_losses_of_the_sources(finished):
    records = [record for record in read_log(finished, "pretrain") if "source_weight" in record]
    assert [record["step"] for record in records] == [4, 8, 12]
    weights: tuple[float, ...] = (0.5, 0.5)
    for record in records:
        weights = updated_weights(weights, list(record["source_loss"].values()), list(REFERENCE.values()))
        assert list(record["source_weight"].values()) == pytest.approx(weights)
    # An untrained model has a loss of about ln 420 = 6.0 on both: the excess is larger on code.
    assert records[-1]["source_weight"]["code"] > 0.9
    read = [name.startswith("code") for step, names in ledger(finished).items() for name in names if step >= 8]
    assert sum(read) / len(read) > 0.85
    assert all(0 <= record["data_wait"] < 1 for record in read_log(finished, "pretrain") if "loss" in record)


def test_a_resumed_run_reads_the_same_samples_with_the_same_weights(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    pointer = folder / "out" / "data.json"  # holds whole paths
    pointer.write_text(pointer.read_text().replace(str(finished), str(folder)))
    stage = folder / "out" / "pretrain"
    for path in (stage / "checkpoints" / "step-14", stage / "checkpoints" / "step-10"):
        shutil.rmtree(path)
    for path in (stage / "done.json", stage / "ledger-0.jsonl"):
        path.unlink()
    result = train(folder, "--stage", "pretrain")
    assert result.code == 0 and "resuming from step 5" in result.out, result
    whole = ledger(finished)
    assert ledger(folder) == {step: whole[step] for step in range(5, 14)}
    assert untimed(folder) == untimed(finished)


def test_a_corpus_that_has_changed_is_named(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "out" / "pretrain" / "done.json").unlink()
    with open(folder / "small.jsonl", "a") as file:
        file.write(json.dumps({"text": "one more row, long enough to be read"}) + "\n")
    result = train(folder, "--stage", "pretrain")
    assert result.code == 2, result
    assert "the corpus has changed since the stage began" in result.err and "small/small.jsonl: " in result.err
    assert "code.jsonl" not in result.err and "Traceback" not in result.err


def test_two_ranks_read_what_one_reads(finished, tmp_path):
    """Each notes its own share; worker processes build the batches of prepared data."""
    folder = tmp_path / "run"
    streamed = "streamed" in str(finished)
    write_sources(folder, streaming=streamed)
    result = train(folder, "--stage", "pretrain", "--set", f"data.workers={0 if streamed else 1}", ranks=2)
    assert result.code == 0, result
    one, shares = ledger(finished), [ledger(folder, rank) for rank in (0, 1)]
    assert {step: shares[0][step] + shares[1][step] for step in range(14)} == one
    logs = [read_log(run, "pretrain") for run in (finished, folder)]
    losses = [[record["loss"] for record in log if "loss" in record] for log in logs]
    # The order of a float32 sum over ranks: differences of 1e-6 that 14 steps may amplify.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
