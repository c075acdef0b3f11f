"""A real recipe as a job: stopped and resumed, it is bit for bit the run that was not, and it has artifacts."""

from __future__ import annotations

import json
from pathlib import Path

from cook.base.files import sha256
from cook.service.executors import LocalExecutor
from cook.service.jobs import now
from tests.recipe.tiny_run import read_log, train, write_run
from tests.service.parts import SUPERVISOR, controller, exit_of, spec, wait_for, wait_state
from tests.warm import interpreter

STAGES = ("pretrain", "layer_mask")
TIMES = ("tokens_per_second", "data_wait")


def results(folder: Path) -> dict:
    logs = {name: read_log(folder, name) for name in STAGES}
    stage = folder / "out" / "layer_mask"
    return {
        "logs": {name: [{k: v for k, v in r.items() if k not in TIMES} for r in log] for name, log in logs.items()},
        "weights": sha256(stage / "model" / "model.safetensors"),
        "mask": sha256(folder / "out" / "masks" / "layer.pt"),
    }


def test_a_job_that_was_stopped_and_resumed_is_the_uninterrupted_run(tmp_path):
    plain = tmp_path / "plain"
    write_run(plain, STAGES, training__steps=40, training__save_every=7, data__paths=[str(plain / "docs")])
    config, scheme = (json.loads((plain / name).read_text()) for name in ("bmcook.json", "l0_pruning.json"))
    done = train(plain, "--stage", "all")
    assert done.code == 0, done

    warm = interpreter()
    executor = LocalExecutor(gpus=(), slots=2, supervisor=(*SUPERVISOR, "--python", warm))
    service = controller(tmp_path / "home", executors={"local": executor})
    service.start()
    variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    job = service.submit(spec(environment=variables, reshape=True, stop_grace=60.0), config, scheme)
    run = job.folder / "run"
    log = run / "out" / "layer_mask" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 10, lambda: service.get(job.id), 120)
    service.stop(job.id)
    stopped = wait_state(service, job, "stopped", seconds=60)
    assert exit_of(job)["outcome"] == 75 and "saved step" in stopped.message, stopped
    service.resume(job.id)
    job = wait_state(service, job, "succeeded", "failed", seconds=180)
    service.close()
    assert job.state == "succeeded" and job.attempt == 2, (job, (job.attempt_folder / "output.log").read_text())
    assert "resuming from step" in (job.attempt_folder / "output.log").read_text()
    assert results(run) == results(plain)
    manifest = {entry["name"]: entry for entry in json.loads((run / "artifacts.json").read_text())}
    wanted = {"pruned/model.safetensors", "report/report.md", "masks/layer.pt", "layer_mask/log.jsonl"}
    assert wanted | {"config/bmcook.json"} <= manifest.keys()
    for entry in manifest.values():
        path = run / entry["path"]
        assert (path.stat().st_size, sha256(path)) == (entry["bytes"], entry["sha256"])
    assert job.ended <= now() and "failed" not in job.message
