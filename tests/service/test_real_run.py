"""A real recipe as a job: stopped or requeued, and resumed, it is bit for bit the uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cook.base.files import sha256
from cook.report.events import TIMES
from cook.service.controller import Controller
from cook.service.executors import LocalExecutor
from cook.service.jobs import Job, now, read
from cook.service.slurm import SlurmExecutor
from tests.recipe.tiny_run import last_step, read_log, train, write_run
from tests.service.parts import SUPERVISOR, controller, exit_of, fill, spec, wait_for, wait_state
from tests.warm import interpreter

STAGES = ("pretrain", "layer_mask")


def results(folder: Path) -> dict:
    logs = {name: read_log(folder, name) for name in STAGES}
    stage = folder / "out" / "layer_mask"
    return {
        "logs": {name: [{k: v for k, v in r.items() if k not in TIMES} for r in log] for name, log in logs.items()},
        "weights": sha256(stage / "model" / "model.safetensors"),
        "mask": sha256(folder / "out" / "masks" / "layer.pt"),
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("plain")
    write_run(folder, STAGES, training__steps=40, training__save_every=7, data__paths=[str(folder / "docs")])
    done = train(folder, "--stage", "all")
    assert done.code == 0, done
    return folder


@contextmanager
def submitted(home: Path, plain: Path, executor: Any, **changes: Any) -> Iterator[tuple[Controller, Job]]:
    """The same recipe as a job."""
    config, scheme = (json.loads((plain / name).read_text()) for name in ("bmcook.json", "l0_pruning.json"))
    name = "slurm" if isinstance(executor, SlurmExecutor) else "local"
    service = controller(home, executors={name: executor})
    service.start()
    variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    values = {"executor": name, "environment": variables, "reshape": False, "stop_grace": 60.0, **changes}
    job = service.submit(spec(**values), config, scheme)
    try:
        yield service, job
        if service.get(job.id).state == "succeeded":
            assert results(job.folder / "run") == results(plain)
    finally:
        if service.get(job.id).state in ("queued", "starting", "running"):
            service.stop(job.id, now=True)
            wait_state(service, job, "stopped", "failed")
        service.close()


def has_waiting(pid: int, number: int) -> bool:
    """Whether a stopped process will receive a signal as soon as it continues."""
    (line,) = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("ShdPnd:")]
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def local() -> LocalExecutor:
    return LocalExecutor(gpus=(), slots=2, supervisor=(*SUPERVISOR, "--python", interpreter()))


def wait_steps(service: Controller, job: Job) -> None:
    wait_for(lambda: last_step(job.folder / "run", "layer_mask") >= 10, lambda: service.get(job.id), 120)


def succeeded(service: Controller, job: Job) -> Job:
    job = wait_state(service, job, "succeeded", "failed", seconds=180)
    assert job.state == "succeeded", (job, (job.attempt_folder / "output.log").read_text())
    return job


def test_a_job_that_was_stopped_and_resumed_is_the_uninterrupted_run(plain, tmp_path):
    with submitted(tmp_path, plain, local(), reshape=True) as (service, job):
        wait_steps(service, job)
        service.stop(job.id)
        stopped = wait_state(service, job, "stopped", seconds=60)
        assert exit_of(job)["outcome"] == 75 and "saved step" in stopped.message, stopped
        service.resume(job.id)
        job = succeeded(service, job)
        assert job.attempt == 2 and "resuming from step" in (job.attempt_folder / "output.log").read_text()
    run = job.folder / "run"
    manifest = {entry["name"]: entry for entry in json.loads((run / "artifacts.json").read_text())}
    wanted = {"pruned/model.safetensors", "report/report.md", "masks/layer.pt", "layer_mask/log.jsonl"}
    assert wanted | {"config/bmcook.json"} <= manifest.keys()
    for entry in manifest.values():
        path = run / entry["path"]
        assert (path.stat().st_size, sha256(path)) == (entry["bytes"], entry["sha256"])
    assert job.ended <= now() and "failed" not in job.message


def test_a_job_that_was_stopped_while_it_prepared_its_data_is_the_uninterrupted_run(plain, tmp_path):
    with submitted(tmp_path, plain, local()) as (service, job):
        out = job.folder / "run" / "out"
        wait_for((out / "data" / ".lock").exists, lambda: service.get(job.id), 60)
        trainer = read(out / "run.lock")["processes"][0]["pid"]
        os.kill(trainer, signal.SIGSTOP)  # so that it cannot begin before the request
        assert not (out / "pretrain" / "log.jsonl").exists()
        service.stop(job.id)
        wait_for(lambda: has_waiting(trainer, signal.SIGTERM), "the request to stop", 60)
        os.kill(trainer, signal.SIGCONT)
        stopped = wait_state(service, job, "stopped", seconds=60)
        assert exit_of(job)["outcome"] == 75 and "outside the training steps" in stopped.message, stopped
        assert not (out / "pretrain" / "log.jsonl").exists() and not (out / "run.lock").exists()
        service.resume(job.id)
        assert succeeded(service, job).attempt == 2


def test_a_job_that_slurm_requeued_is_the_uninterrupted_run(plain, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    executor = SlurmExecutor(supervisor=(*SUPERVISOR, "--python", interpreter()), settling=0.5)
    with submitted(tmp_path, plain, executor) as (service, job):
        wait_steps(service, job)
        number = read(job.folder / "attempts" / "1" / "submitted.json")["slurm_job"]
        assert cluster.run("scontrol", "requeue", number).returncode == 0
        wait_for(lambda: "(BeginTime)" in service.get(job.id).message, lambda: service.get(job.id))
        assert service.get(job.id).state == "starting" and service.get(job.id).ended is None
        job = succeeded(service, job)
        assert job.attempt == 1 and exit_of(job)["outcome"] == 0, "Slurm has started the same attempt again"
        process = read(job.attempt_folder / "process.json")
        assert (process["slurm_job"], process["restart"]) == (number, 1)
        assert "resuming from step" in (job.attempt_folder / "output.log").read_text()


def test_a_job_that_a_full_disk_ended_says_so_and_is_the_uninterrupted_run(plain, small_disk):
    with submitted(small_disk, plain, local()) as (service, job):
        wait_steps(service, job)
        fill(small_disk / "filler")
        failed = wait_state(service, job, "failed", seconds=60)
        assert exit_of(job)["outcome"] == 1 and "No space left" in failed.message, failed
        (small_disk / "filler").unlink()
        service.resume(job.id)
        assert succeeded(service, job).attempt == 2
