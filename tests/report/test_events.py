import json
import math
from io import FileIO

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cook.base.errors import UserError
from cook.report import events
from cook.report.events import EventLog, by_part, read_log, scalars


def training_record(step, **more):
    return {"step": step, "loss": 5.0 - step / 100, "learning_rate": 1e-3, "tokens": step * 1024, **more}


def board(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def strict(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_every_record_is_on_the_disk_as_soon_as_it_is_written(tmp_path):
    with EventLog(tmp_path / "new" / "stage", tensorboard=False) as log:
        for step in (1, 2):
            log.write(training_record(step))
            assert [r["step"] for r in strict(log.path)] == list(range(1, step + 1))
    assert read_log(log.path) == [training_record(1), training_record(2)]


def test_numbers_that_are_not_finite_become_null_with_a_note(tmp_path):
    with EventLog(tmp_path, tensorboard=True) as log:
        log.write(
            {
                "step": 3,
                "loss": math.nan,
                "grad_norm": torch.tensor(math.inf),
                "learning_rate": np.float32(0.5),
                "lambda": {"heads.0": {"lambda1": -math.inf, "lambda2": 1.0}},
                "sizes": [1.0, math.nan],
            }
        )
    assert strict(log.path) == [
        {
            "step": 3,
            "loss": None,
            "grad_norm": None,
            "learning_rate": 0.5,
            "lambda": {"heads.0": {"lambda1": None, "lambda2": 1.0}},
            "sizes": [1.0, None],
            "non_finite": {"loss": "nan", "grad_norm": "inf", "lambda/heads.0/lambda1": "-inf", "sizes/1": "nan"},
        }
    ]
    assert board(tmp_path) == {"train/learning_rate": [(3, 0.5)], "sparsity/heads.0/lambda2": [(3, 1.0)]}


def test_rewinding_doubles_no_step_in_either_log(tmp_path):
    with EventLog(tmp_path, tensorboard=True) as log:
        for step in range(1, 11):
            log.write({"step": step, "loss": 1.0})
    with EventLog(tmp_path, tensorboard=True) as log:  # died at step 10, its checkpoint is of step 6
        log.rewind(6)
        assert [r["step"] for r in read_log(log.path)] == [1, 2, 3, 4, 5, 6]
        for step in range(7, 13):
            log.write({"step": step, "loss": 2.0})
    expected = [(s, 1.0) for s in range(1, 7)] + [(s, 2.0) for s in range(7, 13)]
    assert [(r["step"], r["loss"]) for r in read_log(log.path)] == expected
    assert board(tmp_path)["train/loss"] == expected


def test_an_evaluation_that_is_done_again_is_not_there_twice(tmp_path):
    with EventLog(tmp_path, tensorboard=False) as log:
        for record in ({"step": 1, "held_out_loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "held_out_loss": 2.5}):
            log.write(record)
        log.rewind(2)  # killed after the evaluation at the end, and before the stage was done
        assert read_log(log.path) == [{"step": 1, "held_out_loss": 3.0}, {"step": 2, "loss": 2.0}]


def test_tensorboard_shows_each_evaluation_once_after_a_kill_before_the_stage_is_done(tmp_path):
    def finish(loss):
        log.write({"step": 2, "loss": 2.0})
        log.write({"step": 2, "held_out_loss": loss})

    with EventLog(tmp_path) as log:
        log.write({"step": 1, "loss": 3.0})
        finish(2.5)
    for _ in range(2):  # the checkpoint is of the last step
        with EventLog(tmp_path) as log:
            log.rewind(2)
            log.write({"step": 2, "held_out_loss": 2.5})
    assert board(tmp_path) == {"train/loss": [(1, 3.0), (2, 2.0)], "train/held_out_loss": [(2, 2.5)]}
    records = read_log(log.path)
    assert records == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "held_out_loss": 2.5}]


def test_records_that_the_disk_does_not_take_wait_and_are_written_with_the_next(tmp_path, monkeypatch, capfd):
    class Full(FileIO):
        room = 30

        def write(self, content):
            if not Full.room:
                raise OSError(28, "No space left on device")
            taken = bytes(content[: Full.room])
            Full.room -= len(taken)
            return super().write(taken)

    monkeypatch.setattr(events, "FileIO", Full)
    with EventLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 4):
            log.write({"step": step, "loss": 1.0})
        assert log.waiting == ('{"step": 2, "loss": 1.0}', '{"step": 3, "loss": 1.0}')
        with pytest.raises(OSError, match="No space left on device: .*log.jsonl"):
            log.settle()
        assert capfd.readouterr().err.count("No space left") == 1, "one warning"
        Full.room = 10_000
        log.write({"step": 4, "loss": 1.0})
        assert log.waiting == () and [r["step"] for r in strict(log.path)] == [1, 2, 3, 4]


def test_what_waited_when_a_checkpoint_was_written_comes_back_with_it(tmp_path):
    with EventLog(tmp_path, tensorboard=False) as log:
        log.write({"step": 1})
        log.write({"step": 2})
        log.rewind(3, ['{"step": 2}', '{"step": 3}'])
    assert read_log(log.path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_rewinding_in_the_middle_of_a_run_and_to_a_fresh_start(tmp_path):
    with EventLog(tmp_path, tensorboard=True) as log:
        for value in (1.0, 2.0):
            log.rewind(-1)
            for step in range(3):
                log.write({"step": step, "loss": value})
    assert [(r["step"], r["loss"]) for r in read_log(log.path)] == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert board(tmp_path)["train/loss"] == [(0, 2.0), (1, 2.0), (2, 2.0)]


def test_a_crash_while_rewinding_leaves_the_old_log_whole(tmp_path, monkeypatch):
    with EventLog(tmp_path, tensorboard=False) as log:
        for step in range(5):
            log.write({"step": step})
    before = log.path.read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cook.base.files.os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        log.rewind(2)
    assert log.path.read_bytes() == before


@pytest.mark.parametrize("rewind", [True, False])
def test_a_line_cut_short_by_a_crash_is_left_out_and_not_glued_to_the_next(tmp_path, rewind):
    with EventLog(tmp_path, tensorboard=False) as log:
        log.write({"step": 1})
    with open(log.path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    assert read_log(log.path) == [{"step": 1}]
    with EventLog(tmp_path, tensorboard=False) as log:
        if rewind:
            log.rewind(1)
        log.write({"step": 2})
    assert strict(log.path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b'{"loss": 1}\n', b"\xff\n", b"\n"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_log(path)
    with pytest.raises(UserError, match="line 2"):
        EventLog(tmp_path, tensorboard=False).rewind(1)


def test_a_missing_log_is_the_users_error_and_nothing_to_rewind(tmp_path):
    with pytest.raises(UserError, match="no such log"):
        read_log(tmp_path / "log.jsonl")
    EventLog(tmp_path / "none", tensorboard=False).rewind(5)
    assert not (tmp_path / "none").exists()


def test_other_ranks_touch_nothing(tmp_path):
    with EventLog(tmp_path / "stage", tensorboard=True, enabled=False) as log:
        log.rewind(0)
        log.write({"no step": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [None, -1, 1.5, True, "3"])
def test_a_record_needs_a_step(tmp_path, step):
    with pytest.raises(ValueError, match="step"):
        EventLog(tmp_path).write({"step": step})


def test_a_refused_value_leaves_no_part_of_a_line(tmp_path):
    with EventLog(tmp_path, tensorboard=False) as log:
        log.write({"step": torch.tensor(1)})
        with pytest.raises(TypeError):
            log.write({"step": 2, "loss": object()})
        log.write({"step": 3})
    assert [r["step"] for r in strict(log.path)] == [1, 3]


def sparsity_record(names):
    return {
        "step": 1,
        "expected_sparsity": {name: index / 10 for index, name in enumerate(names)},
        "target_sparsity": dict.fromkeys(names, 0.5),
        "lambda": {name: {"lambda1": -0.5, "lambda2": float(index)} for index, name in enumerate(names)},
    }


def test_few_constraints_have_a_chart_each_and_many_their_mean_and_limits(tmp_path):
    names = [f"heads.{i}" for i in range(events.MAX_CONSTRAINT_CHARTS)]
    tags = scalars(sparsity_record(names))
    assert set(tags) == {f"sparsity/{n}/{p}" for n in names for p in ("expected", "target", "lambda1", "lambda2")}
    assert tags["sparsity/heads.3/expected"] == 0.3 and tags["sparsity/heads.3/lambda2"] == 3.0

    with EventLog(tmp_path) as log:
        log.write(sparsity_record([*names, "heads.8"]))
    charts = board(tmp_path)
    assert len(charts) == 4 * 3
    assert charts["sparsity/mean/expected"] == [(1, pytest.approx(0.4))]
    assert charts["sparsity/min/expected"] == [(1, 0.0)]
    assert charts["sparsity/max/expected"] == [(1, pytest.approx(0.8))]
    assert charts["sparsity/mean/lambda2"] == [(1, 4.0)]


def test_by_part_takes_plain_and_named_numbers_and_drops_nulls():
    assert by_part({"a": 1, "b": None}, "lambda") == {"lambda": {"a": 1.0}}
    assert by_part({"a": {"lambda1": 1, "lambda2": None}, "b": {"lambda1": 2}}, "lambda") == {
        "lambda1": {"a": 1.0, "b": 2.0}
    }
