"""The executor of this machine, driven by the controller."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from cook.base.processes import Process
from cook.service import executors, trees
from cook.service.jobs import Conflict, JobStore, read
from tests.service.parts import (
    controller,
    create,
    exit_of,
    kill,
    ledger,
    local,
    spec,
    supervise,
    supervisor_of,
    wait_for,
    wait_ledger,
    wait_state,
)


@pytest.fixture
def service(tmp_path):
    made = controller(tmp_path)
    made.start()
    yield made
    for job in made.list(state=("starting", "running", "stopping")):
        with contextlib.suppress(Conflict):  # it has ended by now
            made.stop(job.id, now=True)
    made.close()
    trees.send([pid for job in made.store.all() for pid in trees.marked(f"{job.id}/{job.attempt}")], signal.SIGKILL)


def test_a_job_runs_and_ends(service):
    job = wait_state(service, service.submit(spec(), {}, {}), "succeeded")
    assert job.attempt == 1 and job.message == "finished" and job.started < job.ended
    manifest = json.loads((job.folder / "run" / "artifacts.json").read_text())
    assert {entry["name"] for entry in manifest} == {"config/bmcook.json", "config/l0_pruning.json"}


def test_a_stop_and_a_resume(service):
    job = service.submit(spec(), {"seconds": 0.5}, {})
    wait_ledger(job)
    assert service.stop(job.id).state == "stopping"
    wait_state(service, job, "stopped")
    assert service.resume(job.id).state == "queued"
    assert wait_state(service, job, "succeeded").attempt == 2
    starts = [float(line.split()[2]) for line in ledger(job) if line.startswith("started")]
    assert starts[0] == 0 and 0 < starts[1] < 0.5


def test_a_killed_supervisor_is_noticed_and_its_job_retried(service):
    job = service.submit(spec(retries=1), {"seconds": 0.7}, {})
    wait_ledger(job)
    kill(supervisor_of(job).pid)
    job = wait_state(service, job, "succeeded")
    assert job.attempt == 2 and "overlap" not in ledger(job)
    assert exit_of(job)["outcome"] == 75, "the trainer was warned, and had saved"


def test_orphans_that_do_not_end_are_killed_before_the_job_is_lost(service):
    job = service.submit(spec(stop_grace=0.3), {"seconds": 60, "ignores_term": True}, {})
    wait_ledger(job)
    kill(supervisor_of(job).pid)
    wait_for(lambda: "was killed: waiting for 1 processes" in service.get(job.id).message, "the message")
    assert wait_state(service, job, "lost").attempt == 1
    assert trees.marked(f"{job.id}/1") == []


def test_a_supervisor_that_hangs_does_not_block_a_stop(service, monkeypatch):
    monkeypatch.setattr(executors, "OVERDUE", 0.3)
    job = service.submit(spec(stop_grace=0.2), {"seconds": 60}, {})
    wait_ledger(job)
    os.kill(supervisor_of(job).pid, signal.SIGSTOP)
    service.stop(job.id)
    wait_state(service, job, "stopped")
    assert trees.marked(f"{job.id}/1") == []


def test_a_supervisor_that_cannot_start_ends_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "RETRY_SPAWN", 0.0)
    broken = local(supervisor=(sys.executable, "-ISc", "raise SystemExit('no disk')"))
    service = controller(tmp_path, executors={"local": broken})
    service.start()
    job = wait_state(service, service.submit(spec(retries=3), {}, {}), "failed")
    assert job.attempt == 1
    assert (job.attempt_folder / "supervisor.log").read_text().count("no disk") == executors.MAX_SPAWNS
    service.close()


def test_a_supervisor_that_another_server_has_spawned_is_not_doubled(tmp_path):
    job = create(JobStore(tmp_path), {"seconds": 0.3})
    JobStore(tmp_path).begin(job.id)
    first = supervise(job)  # spawned, and the server was killed before it saw process.json
    service = controller(tmp_path)
    service.start()
    wait_state(service, job, "succeeded")
    service.close()
    assert first.wait(5) in (0, 3)
    assert len([line for line in ledger(job) if line.startswith("started")]) == 1


def test_a_restarted_machine_is_noticed(tmp_path, monkeypatch):
    store = JobStore(tmp_path)
    job = create(store)
    store.begin(job.id)
    folder = store.attempt_folder(job.id, 1)
    process = {"host": os.uname().nodename, "boot": "earlier", "pid": 1, "started": "1"}
    (folder / "process.json").write_text(json.dumps({"supervisor": process, "started": "2026-01-01T00:00:00+00:00"}))
    assert Process.from_json(process).fate() == "unknown"
    executor = local()
    executor.tend(store.get(job.id))
    assert store.get(job.id).state == "running", "it has been silent for a short time only"
    monkeypatch.setattr(executors, "SILENCE", 0.0)
    with open(folder / "lock", "w") as lock:
        executors.fcntl.flock(lock, executors.fcntl.LOCK_EX)
        executor.tend(store.get(job.id))
        assert store.get(job.id).state == "running", "somebody holds the lock"
    executor.tend(store.get(job.id))
    assert store.get(job.id).state == "lost"


def test_priority_then_order_and_a_large_job_is_not_passed(tmp_path):
    service = controller(tmp_path, executors={"local": local(slots=2)})
    first, large, small = (service.submit(spec(processes=n), {"seconds": 0.2}, {}) for n in (1, 2, 1))
    urgent = service.submit(spec(priority=1), {"seconds": 0.2}, {})
    service.start()
    wait_state(service, small, "succeeded")
    service.close()
    started = {job.id: service.store.get(job.id).started for job in (first, large, small, urgent)}
    assert max(started[urgent.id], started[first.id]) < started[large.id] < started[small.id]


def test_gpus_are_counted_and_too_large_a_job_is_refused(tmp_path):
    executor = local(gpus=("GPU-a", "GPU-b"))
    assert "needs 3 GPUs, and this machine has 2" in executor.problem(spec(gpus=3))
    store = JobStore(tmp_path)
    one, two = create(store, gpus=1), create(store, gpus=2)
    assert executor.has_room(one, [one]) and not executor.has_room(two, [one])
    executor.prepare(tmp_path)
    assert read(tmp_path / "leases" / "gpus.json") == {"gpus": ["GPU-a", "GPU-b"]}


def test_gpus_are_found_by_their_uuids(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert executors.find_gpus() == []
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU-1234\necho GPU-5678\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert executors.find_gpus() == ["GPU-1234", "GPU-5678"]


def test_the_server_may_end_while_jobs_run(tmp_path):
    """The server is a process of its own here, in a session that is killed."""
    code = (
        "import sys, time; from pathlib import Path; from tests.service.parts import controller, spec\n"
        "c = controller(Path(sys.argv[1])); c.start(); c.submit(spec(), {'seconds': 1.0}, {}); time.sleep(60)"
    )
    server = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], start_new_session=True)
    job = wait_for(lambda: next(iter(JobStore(tmp_path).all()), None), "the job")
    wait_ledger(job)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    service = controller(tmp_path)
    assert service.get(job.id).state == "running"
    service.start()
    assert wait_state(service, job, "succeeded").attempt == 1
    service.close()
    assert len([line for line in ledger(job) if line.startswith("started")]) == 1
