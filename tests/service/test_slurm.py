"""The executor for Slurm on a cluster of one node that the test starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from cook.service import slurm, trees
from cook.service.jobs import JobStore
from cook.service.slurm import SlurmExecutor, name_of, script, submission
from tests.service.parts import (
    SUPERVISOR,
    controller,
    create,
    exit_of,
    kill,
    ledger,
    spec,
    supervisor_of,
    wait_for,
    wait_ledger,
    wait_state,
)
from tests.service.slurm_cluster import Cluster, missing


@pytest.fixture
def executor(cluster, monkeypatch):
    return executor_of(cluster, monkeypatch)


def executor_of(cluster, monkeypatch) -> SlurmExecutor:
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    return SlurmExecutor(supervisor=SUPERVISOR, timeout=20.0, settling=0.5)


@pytest.fixture(scope="module", params=["no accounting", "accounting"])
def either_cluster(request):
    if request.param == "no accounting":
        yield request.getfixturevalue("cluster")
        return
    if reason := missing(accounting=True):
        pytest.skip(f"Slurm with accounting: {reason}")
    with Cluster(accounting=True) as made:
        yield made


@pytest.fixture
def service(executor, cluster, tmp_path):
    made = controller(tmp_path, executors={"slurm": executor})
    made._poll = 0.2
    made.start()
    yield made
    made.close()
    for each in executor._jobs or ():
        cluster.run("scancel", str(each.number))
    trees.send([pid for job in made.store.all() for pid in trees.marked(f"{job.id}/{job.attempt}")], signal.SIGKILL)


def submit(service, config=None, **changes):
    return service.submit(spec(executor="slurm", **changes), config or {}, {})


def listed(cluster, job) -> list[dict]:
    jobs = json.loads(cluster.run("squeue", "--json").stdout)["jobs"]
    return [each for each in jobs if each["name"] == name_of(job)]


def starts(job) -> int:
    return len([line for line in ledger(job) if line.startswith("started")])


def test_a_job_runs_and_ends_and_its_failure_is_the_trainers(service):
    good, bad = submit(service), submit(service, {"code": 2})
    assert wait_state(service, good, "succeeded").attempt == 1
    assert wait_state(service, bad, "failed").message == "the stand-in ended with 2"
    assert starts(good) == starts(bad) == 1


def test_a_running_job_stops_gracefully_and_resumes(service):
    job = submit(service, {"seconds": 2})
    wait_ledger(job)
    wait_for(lambda: service.get(job.id).message.startswith("Slurm job"), "Slurm's number in the message")
    service.stop(job.id)
    wait_state(service, job, "stopped")
    assert exit_of(job)["outcome"] == 75, "it has saved"
    service.resume(job.id)
    assert wait_state(service, job, "succeeded").attempt == 2 and starts(job) == 2


def test_a_pending_job_says_why_and_is_cancelled(service, cluster):
    job = submit(service, processes=1000)
    held = submit(service, slurm={"constraint": "none-such"})
    cluster.run("scontrol", "update", "NodeName=" + os.uname().nodename, "State=DRAIN", "Reason=test")
    waiting = submit(service)
    try:
        wait_for(lambda: "in Slurm's queue" in service.get(waiting.id).message, "the reason")
        wait_for(lambda: "sbatch failed" in service.get(held.id).message, "Slurm's refusal")
        for each in (waiting, job, held):
            service.stop(each.id)
            assert wait_state(service, each, "stopped").message.startswith(("Slurm job", "stopped", "cancelled"))
        job = service.get(waiting.id)
        wait_for(lambda: all(each["job_state"] == "CANCELLED" for each in listed(cluster, job)), "the cancel")
    finally:
        cluster.run("scontrol", "update", "NodeName=" + os.uname().nodename, "State=RESUME")
    assert starts(waiting) == 0


def test_a_job_that_slurm_puts_back_into_its_queue_is_not_submitted_again(service, cluster):
    job = submit(service, {"seconds": 2.5}, retries=1)
    wait_ledger(job)
    job = service.get(job.id)
    (before,) = listed(cluster, job)
    cluster.run("scontrol", "requeue", str(before["job_id"]))
    wait_for(lambda: "in Slurm's queue" in service.get(job.id).message, lambda: service.get(job.id))
    wait_state(service, job, "starting")
    (after,) = listed(cluster, job)
    assert after["job_id"] == before["job_id"]
    assert wait_state(service, job, "succeeded", seconds=60).attempt == 1
    assert exit_of(job)["outcome"] == 0 and starts(job) == 2 and "overlap" not in ledger(job)


def test_a_job_that_waits_in_slurms_queue_again_can_be_stopped(service, cluster):
    job = submit(service, {"seconds": 60}, retries=1)
    wait_ledger(job)
    (slurm,) = listed(cluster, service.get(job.id))
    cluster.run("scontrol", "requeuehold", str(slurm["job_id"]))
    wait_state(service, job, "starting")
    service.stop(job.id)
    assert wait_state(service, job, "stopped").attempt == 1 and starts(job) == 1


def test_sbatch_that_is_cut_short_after_its_success_is_adopted(service, executor, cluster, tmp_path, monkeypatch):
    real, calls = executor._run, []

    def cut_short(command, script=None):
        done = real(command, script)
        if command[0] == "sbatch":
            calls.append(command)
            return None
        return done

    monkeypatch.setattr(executor, "_run", cut_short)
    monkeypatch.setattr(slurm, "LATE_SUBMISSION", 2.0)
    job = submit(service, {"seconds": 1.0})
    wait_state(service, job, "succeeded")
    assert len(calls) == 1 and starts(job) == 1


def test_a_server_that_was_killed_after_sbatch_adopts_the_job(executor, cluster, tmp_path):
    store = JobStore(tmp_path)
    job = create(store, {"seconds": 1.0}, executor="slurm")
    job = store.begin(job.id)
    command = submission(job, SUPERVISOR)
    subprocess.run(command, input=script(job, SUPERVISOR), text=True, check=True, capture_output=True)
    made = controller(tmp_path, executors={"slurm": executor})
    made.start()
    wait_state(made, job, "succeeded")
    made.close()
    assert starts(job) == 1 and len(listed(cluster, job)) == 1


def test_two_slurm_jobs_of_one_attempt_run_it_once(executor, cluster, tmp_path):
    store = JobStore(tmp_path)
    job = create(store, {"seconds": 1.0}, executor="slurm")
    job = store.begin(job.id)
    for _ in range(2):
        text = script(job, SUPERVISOR)
        subprocess.run(submission(job, SUPERVISOR), input=text, text=True, check=True, capture_output=True)
    made = controller(tmp_path, executors={"slurm": executor})
    made.start()
    wait_state(made, job, "succeeded")
    made.close()
    assert starts(job) == 1 and "overlap" not in ledger(job)


def test_without_slurmctld_jobs_keep_their_state(service, cluster):
    running, ending = submit(service, {"seconds": 60}), submit(service, {"seconds": 1.5})
    for job in (running, ending):
        wait_ledger(job)
    cluster.stop_controller()
    try:
        waiting = submit(service)
        wait_for(lambda: "the state is unknown" in service.get(running.id).message, "the message", 60)
        assert service.get(running.id).state == "running" and service.get(waiting.id).state == "queued"
        # What needs no answer of Slurm continues.
        wait_state(service, ending, "succeeded")
        service.stop(running.id)
        wait_state(service, running, "stopped")
    finally:
        cluster.start_controller()
    wait_state(service, waiting, "succeeded", seconds=60)
    assert starts(running) == starts(waiting) == 1


def test_a_killed_supervisor_is_retried_under_slurm(service):
    job = submit(service, {"seconds": 1.0}, retries=1)
    wait_ledger(job)
    kill(supervisor_of(job).pid)
    assert wait_state(service, job, "succeeded", seconds=40).attempt == 2
    assert "overlap" not in ledger(job)


def test_of_a_job_that_slurm_has_forgotten_exit_json_decides_and_then_silence(either_cluster, tmp_path, monkeypatch):
    cluster, executor = either_cluster, executor_of(either_cluster, monkeypatch)
    store, made = JobStore(tmp_path), []
    for config in ({}, {"seconds": 60, "silent": True}):
        job = store.begin(create(store, config, executor="slurm").id)
        text = script(job, SUPERVISOR)
        subprocess.run(submission(job, SUPERVISOR), input=text, text=True, check=True, capture_output=True)
        made.append(job)
    good, lost = made
    wait_ledger(lost)
    wait_for(lambda: exit_of(good), "its end")
    kill(supervisor_of(lost).pid)  # without an exit.json
    wait_for(lambda: not any(listed(cluster, job) for job in made), "MinJobAge", 90)
    if cluster.accounting:
        recorded = cluster.run("sacct", "--allusers", "--noheader", "--format=JobName%40").stdout
        assert all(name_of(job) in recorded for job in made)
    executor._silence = 1.0
    service = controller(tmp_path, executors={"slurm": executor})
    service.start()
    began = time.monotonic()
    wait_state(service, good, "succeeded")
    wait_for(lambda: "no longer knows it" in service.get(lost.id).message, "the message")
    assert wait_state(service, lost, "lost").attempt == 1 and time.monotonic() - began >= 1.0
    service.close()


def test_options_are_known_ones_and_single_arguments(tmp_path):
    assert "unknown options wrap" in SlurmExecutor().problem(spec(slurm={"wrap": "rm"}))
    assert SlurmExecutor().problem(spec(slurm=dict.fromkeys(slurm.OPTIONS, "1"))) is None
    job = create(JobStore(tmp_path), executor="slurm", gpus=2, slurm={"time": "10", "partition": "a b; rm -rf"})
    command = submission(job)
    assert "--partition=a b; rm -rf" in command and "--gres=gpu:2" in command and "--signal=B:TERM@20" in command
