"""Micro-batches that are halved until they fit: the record of the search, and whole runs whose memory is full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cook.base.errors import UserError
from cook.config.types import TrainingConfig
from cook.training.micro_batch import RECORD, MicroBatch
from tests.recipe.tiny_run import Result, read_log, train, write_run

LAYOUT = {"zero_stage": 2, "precision": "fp32"}


def search(folder: Path, batch: int = 12, **layout: Any) -> MicroBatch:
    training = TrainingConfig(steps=1, train_batch_size=batch, micro_batch_size="auto", learning_rate=0.1)
    return MicroBatch(folder, training, LAYOUT | layout)


def limited(largest: int, found: MicroBatch, error: type[Exception] = torch.OutOfMemoryError) -> Callable[[], None]:
    """A pass for which memory suffices up to a size; like any pass it draws random numbers."""

    def tried() -> None:
        torch.rand(3)
        if found.rows > largest:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes")

    return tried


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_it_halves_to_a_divisor_until_memory_suffices(tmp_path, capsys, error):
    found, tried = search(tmp_path), []
    state = torch.get_rng_state()
    while not found.is_good:
        tried.append(found.rows)
        found.fits(limited(3, found, error))
    assert tried == [12, 6, 3]
    assert torch.equal(torch.get_rng_state(), state)
    assert "a micro-batch of 12 rows does not fit in the memory of rank 0; trying 6" in capsys.readouterr().out
    again = search(tmp_path)
    assert (again.rows, again.is_good) == (3, True)


def test_other_errors_are_not_taken_for_a_full_memory(tmp_path):
    found = search(tmp_path)
    with pytest.raises(RuntimeError, match="shapes"):
        found.fits(lambda: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    assert found.rows == 12


def test_a_size_that_did_not_survive_is_halved_by_the_next_start(tmp_path):
    search(tmp_path)  # recorded before it is used; the process is killed
    assert search(tmp_path).rows == 6
    last = search(tmp_path)
    assert (last.rows, last.is_good) == (3, False)
    last.works()
    assert (search(tmp_path).rows, search(tmp_path).is_good) == (3, True)


def test_a_later_failure_is_for_the_next_start(tmp_path):
    found = search(tmp_path)
    found.works()
    assert "run the same command again" in str(found.failure())
    assert search(tmp_path).rows == 6


def test_other_settings_begin_a_new_search(tmp_path):
    found = search(tmp_path)
    found.fits(limited(6, found))
    for changed in (search(tmp_path, zero_stage=3), search(tmp_path, batch=24)):
        assert changed.rows == changed._share and not changed.is_good


def test_one_row_that_does_not_fit_is_an_error(tmp_path):
    found = search(tmp_path, batch=1)
    with pytest.raises(UserError, match="a micro-batch of one row does not fit .*\n(.*\n)*.*activation_checkpointing"):
        found.fits(limited(0, found))


def run(folder: Path, *options: str, ranks: int = 0, fault: str | None = None, **changes: Any) -> Result:
    if not folder.exists():
        write_run(folder, ("pretrain", "layer_mask"), deepspeed__zero_optimization={"stage": 2}, **changes)
    variables = {} if fault is None else {"COOK_FAULT_POINT": fault}
    return train(folder, *options, ranks=ranks, **variables)


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / stage / "model" / "model.safetensors")


def losses(folder: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in read_log(folder, "pretrain") if "loss" in entry}


def record(folder: Path, stage: str) -> tuple[int, bool]:
    found = json.loads((folder / "out" / stage / RECORD).read_text())
    return found["rows"], found["good"]


@pytest.mark.slow
def test_a_full_memory_on_one_rank_of_two_changes_the_split_and_nothing_else(tmp_path):
    changes = {"model__config__dropout_p": 0.1, "training__steps": 3}
    auto, given = tmp_path / "auto", tmp_path / "given"
    result = run(auto, "--stage", "all", ranks=2, fault="memory.trial:1", training__micro_batch_size="auto", **changes)
    assert result.code == 0, result
    assert "pretrain: a micro-batch of 2 rows does not fit in the memory of rank 1; trying 1" in result.out
    assert record(auto, "pretrain") == (1, True) and record(auto, "layer_mask") == (2, True)
    split = ("--set", "stages.pretrain.training.micro_batch_size=1")
    result = run(given, "--stage", "all", *split, ranks=2, training__micro_batch_size=2, **changes)
    assert result.code == 0, result
    for stage in ("pretrain", "layer_mask"):
        # Bit for bit: also the random numbers of dropout are those of a run that never tried.
        expected = weights(given, stage)
        assert all(torch.equal(value, expected[name]) for name, value in weights(auto, stage).items())


@pytest.mark.slow
def test_a_full_memory_in_a_later_step_continues_with_half_from_the_checkpoint(tmp_path):
    auto = tmp_path / "auto"
    changes = {"training__micro_batch_size": "auto", "training__save_every": 2}
    result = run(auto, "--stage", "pretrain", fault="memory.step:0:4", **changes)
    assert result.code == 1 and "out of memory with micro-batches of 4 row(s)" in result.err, result
    assert "run the same command again" in result.err and record(auto, "pretrain") == (4, False)
    first = losses(auto)
    result = run(auto, "--stage", "pretrain")
    assert result.code == 0 and "resuming from step 2" in result.out, result
    assert record(auto, "pretrain") == (2, True)
    then = losses(auto)
    assert list(first) == [1, 2, 3] and list(then) == [1, 2, 3, 4, 5, 6]
    # The same batch at the same weights, in two micro-batches: fp32 sums in another order.
    assert then[3] == pytest.approx(first[3], rel=1e-5)
