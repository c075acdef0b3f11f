"""Real supervisors with a small program in place of the trainer."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from cook.service import supervisor, trees
from cook.service.environment import job_environment
from cook.service.jobs import JobStore, read
from tests.service.parts import create, exit_of, kill, ledger, supervise, supervisor_of, wait_for, wait_ledger


@pytest.fixture
def store(tmp_path) -> JobStore:
    return JobStore(tmp_path)


def end(job, process) -> dict:
    process.wait(30)
    found = exit_of(job)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("config", "outcome", "reason"),
    [
        ({}, 0, "finished"),
        ({"code": 2}, 2, "the stand-in ended with 2"),
        ({"code": 76}, 76, "the stand-in ended with 76"),
        ({"code": 3, "silent": True}, 1, "exit code 3"),
        ({"kill": 9}, 76, "SIGKILL, which nobody asked for"),
        ({"ranks": 2, "code": 76}, 76, "the stand-in ended with 76"),  # its launcher ends with 1
    ],
)
def test_the_end_has_the_outcome_that_the_launcher_hides(store, config, outcome, reason):
    job = create(store, config)
    found = end(job, supervise(job))
    assert (found["outcome"], reason in found["reason"]) == (outcome, True), found
    assert found["started"] <= found["ended"]
    assert (job.folder / "run" / "artifacts.json").exists() == (outcome == 0)


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("way", ["signal", "file"])
def test_a_stop_reaches_the_ranks_and_not_their_launcher(store, ranks, way):
    job = create(store, {"seconds": 20, "ranks": ranks}, processes=ranks or 1)
    process = supervise(job)
    wait_ledger(job)
    if way == "signal":
        os.kill(supervisor_of(job).pid, signal.SIGTERM)
    else:
        store.want(job.id, "stop", 1)
    found = end(job, process)
    assert found["outcome"] == 75 and "launcher signalled" not in ledger(job)
    # Nobody asked: a signal alone may come from Slurm, or from a machine that shuts down.
    assert store.get(job.id).state == ("failed" if way == "signal" else "stopped")


def test_a_request_from_before_the_start_takes_effect(store):
    job = create(store)
    store.want(job.id, "stop", 1)
    found = end(job, supervise(job))
    assert found["outcome"] == 75 and ledger(job) == [] and store.get(job.id).state == "stopped"


@pytest.mark.parametrize("request_", ["stop", "stop now"])
def test_what_does_not_stop_is_killed_after_the_grace(store, request_):
    job = create(store, {"seconds": 30, "ignores_term": True}, stop_grace=0.4)
    process = supervise(job)
    wait_ledger(job)
    asked = time.monotonic()
    store.want(job.id, request_, 1)
    found = end(job, process)
    assert 0.4 <= time.monotonic() - asked < 5
    assert store.get(job.id).state == "stopped" and "killed" in found["reason"]


def test_it_ends_only_when_every_process_has_ended(store):
    job = create(store, {"leftover": 30, "code": 1}, stop_grace=0.5)
    process = supervise(job)
    wait_ledger(job, "ended")
    left = trees.marked(f"{job.id}/1")
    assert exit_of(job) is None and left, "a process without a parent is left"
    end(job, process)
    assert trees.marked(f"{job.id}/1") == []


def test_sigusr1_reaches_only_what_handles_it(store):
    job = create(store, {"seconds": 20})
    process = supervise(job)
    os.kill(supervisor_of(job).pid, signal.SIGUSR1)  # the program has no handler yet, and would end
    wait_ledger(job)
    wait_for(lambda: os.kill(process.pid, signal.SIGUSR1) or "saved" in ledger(job), "the save")
    store.want(job.id, "stop", 1)
    assert end(job, process)["outcome"] == 75


def test_one_attempt_has_one_supervisor(store):
    job = create(store, {"seconds": 0.3})
    codes = sorted(process.wait(20) for process in [supervise(job) for _ in range(4)])
    assert codes == [0] + [supervisor.ALREADY] * 3
    assert supervise(job).wait(20) == supervisor.ALREADY, "also when the attempt has ended"
    assert [line for line in ledger(job) if line.startswith("started")] == [f"started at 0.00 as {job.id}/1"]


@pytest.mark.parametrize("ranks", [0, 2])
def test_the_run_does_not_outlive_a_killed_supervisor(store, ranks):
    job = create(store, {"seconds": 60, "ranks": ranks}, processes=ranks or 1)
    process = supervise(job)
    wait_ledger(job)
    kill(supervisor_of(job).pid)
    process.wait(10)
    wait_for(lambda: not trees.marked(f"{job.id}/1"), "the end of the run")
    assert exit_of(job) is None
    if not ranks:
        assert read(job.folder / "run" / "out" / "outcome.json")["code"] == 75, "it has saved"


def gpus(store: JobStore, *names: str) -> None:
    (store.home / "leases").mkdir()
    (store.home / "leases" / "gpus.json").write_text(json.dumps({"gpus": list(names)}))


def test_a_gpu_is_leased_to_one_attempt_until_its_last_process_has_ended(store):
    gpus(store, "GPU-a")
    first = create(store, {"seconds": 30, "ignores_term": True}, gpus=1, stop_grace=0.3)
    second = create(store, {}, gpus=1)
    one = supervise(first)
    wait_ledger(first)
    assert read(first.folder / "attempts" / "1" / "process.json")["gpus"] == ["GPU-a"]
    two = supervise(second)
    wait_for(lambda: "waiting for 1 free" in store.get(second.id).message, "the message")
    assert store.get(second.id).state == "starting"
    kill(one.pid)
    one.wait()
    time.sleep(0.7)
    assert ledger(second) == [], "the killed supervisor's child still holds the GPU"
    for pid in trees.marked(f"{first.id}/1"):
        kill(pid)
    assert end(second, two)["outcome"] == 0


def test_the_lock_of_a_lost_run_is_removed_and_that_of_another_is_not(store):
    job = create(store)
    lock = job.folder / "run" / "out" / "run.lock"
    lock.parent.mkdir()
    for number, earlier in ((2, {"outcome": 76}), (3, {"outcome": None, "lost": True})):
        lock.touch()
        supervise(job, number - 1).wait(20)
        (job.folder / "attempts" / str(number - 1) / "exit.json").write_text(json.dumps(earlier))
        assert supervise(job, number).wait(20) == 0
        assert lock.exists() == (number == 2)


def test_waiting_for_a_gpu_can_be_stopped(store):
    gpus(store)
    job = create(store, gpus=1)
    process = supervise(job)
    supervisor_of(job)
    store.want(job.id, "stop now", 1)
    assert "GPUs" in end(job, process)["reason"] and store.get(job.id).state == "stopped"


def test_the_environment_is_built_and_not_inherited(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("HF_HOME", "/models")
    spec = {"id": "a" * 12, "processes": 1, "environment": {"DS_ACCELERATOR": "cpu"}}
    found = job_environment(spec, 2, [0, 3])
    assert "AWS_SECRET_ACCESS_KEY" not in found
    wanted = dict(HF_HOME="/models", CUDA_VISIBLE_DEVICES="0,3", COOK_JOB=f"{'a' * 12}/2", DS_ACCELERATOR="cpu")
    assert wanted.items() <= found.items() and {"PATH", "HOME", "LANG", "OMP_NUM_THREADS"} <= found.keys()


def test_a_slurm_job_that_was_put_back_runs_the_attempt_again(store):
    job = create(store, {"code": 75})
    assert supervise(job, SLURM_JOB_ID="7").wait(20) == 75
    assert supervise(job, SLURM_JOB_ID="7").wait(20) == supervisor.ALREADY
    assert supervise(job, SLURM_JOB_ID="8", SLURM_RESTART_COUNT="1").wait(20) == supervisor.ALREADY
    assert supervise(job, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1").wait(20) == 75
    assert len([line for line in ledger(job) if line.startswith("started")]) == 2
    assert {"exit.json", "exit.0.json", "process.0.json"} <= set(os.listdir(job.folder / "attempts" / "1"))
