"""The client commands against a running server: retries, downloads, exit codes, and the whole path of a job."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx
import pytest

from cook.base.errors import RunFailed, UserError, UserErrors
from cook.service.bundle import bundle
from cook.service.client import Client, _parsed, find_server, new_key
from cook.service.executors import LocalExecutor
from cook.service.planner import Planner
from tests.command import told
from tests.recipe.tiny_run import own_environment, write_run
from tests.service.live import recipe, serving
from tests.service.parts import SUPERVISOR, local, wait_for
from tests.warm import interpreter

SMALL = ("pretrain", "layer_mask")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_run(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def live(tmp_path_factory, inputs):
    with serving(tmp_path_factory.mktemp("home"), roots=[inputs]) as running:
        yield running


@pytest.fixture
def client(live):
    with Client(live.url, live.token, pause=0.01) as made:
        yield made


@pytest.fixture
def cook(live, inputs, capsys, monkeypatch):
    """Runs a client command in the folder of the recipe; returns its exit code, output and errors."""
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("COOK_HOME", str(live.server.options.home))
    for name in ("COOK_SERVER", "COOK_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    return partial(told, capsys)


def submitted(cook, inputs, *options: object) -> dict:
    code, out, err = cook("submit", inputs / "bmcook.json", "--json", *options)
    assert code == 0, err
    return json.loads(out)


# Where the server is


def test_the_server_of_this_machine_is_found(live, monkeypatch, tmp_path):
    monkeypatch.setenv("COOK_HOME", str(live.server.options.home))
    assert find_server() == (live.url, live.token)
    monkeypatch.setenv("COOK_TOKEN", "other")
    assert find_server() == (live.url, "other")
    (tmp_path / "token").write_text("third\n")
    assert find_server("https://cook.example.org/", tmp_path / "token") == ("https://cook.example.org", "third")
    monkeypatch.setenv("COOK_HOME", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no server"):
        find_server()


def test_a_token_goes_to_no_other_machine_unasked_or_unencrypted(live, monkeypatch):
    monkeypatch.setenv("COOK_HOME", str(live.server.options.home))
    monkeypatch.delenv("COOK_TOKEN", raising=False)
    with pytest.raises(UserError, match="no token for"):
        find_server("https://cook.example.org")
    for url in ("http://cook.example.org", "http://127.0.0.1.example.org:1", "ftp://x", "x"):
        with pytest.raises(UserError, match="--server"):
            find_server(url)


# Requests


class Flaky(httpx.BaseTransport):
    """Sends requests, and loses the answers to the first ones."""

    def __init__(self, losses: int, *, before: bool = False):
        self.inner, self.losses, self.before = httpx.HTTPTransport(), losses, before

    def handle_request(self, request):
        if self.losses and self.before:
            self.losses -= 1
            raise httpx.ConnectError("refused")
        answer = self.inner.handle_request(request)
        if self.losses:
            self.losses -= 1
            answer.close()
            raise httpx.ReadTimeout("lost")
        return answer

    def close(self):
        self.inner.close()


def test_a_submission_whose_answer_is_lost_is_not_doubled(live, inputs):
    before = len(live.controller.list(limit=1000))
    body = recipe(inputs, SMALL)
    with Client(live.url, live.token, pause=0.01) as client:
        client._http._transport = Flaky(3)
        job = client.submit(body, new_key(body))
        client._http._transport.close()
    assert len(live.controller.list(limit=1000)) == before + 1 and live.controller.get(job["id"])


def test_a_server_that_cannot_be_reached(live):
    with Client("http://127.0.0.1:9", "x", pause=0.001) as client, pytest.raises(RunFailed, match="cannot be reached"):
        client.job("aaaaaaaaaaaa")
    with Client(live.url, "wrong", pause=0.001) as client, pytest.raises(UserError, match="token"):
        client.job("aaaaaaaaaaaa")


def test_events_are_read_over_lost_connections(live, client, inputs):
    job = live.job(recipe(inputs, SMALL))
    stage = job.folder / "run" / "out" / "pretrain"
    stage.mkdir(parents=True)
    (stage / "log.jsonl").write_text('{"step": 0}\n')
    steps: list[int] = []
    for name, data in client.events(job.id):
        if name == "metrics":
            steps += [record["step"] for record in data["records"]]
        if name == "ready":
            if steps[-1] == 3:
                break
            with open(stage / "log.jsonl", "a") as file:
                file.write(f'{{"step": {steps[-1] + 1}}}\n')
            live.server.service.streams.close()  # the stream ends, and the client connects again
            live.server.service.streams.closed = False
    assert steps == [0, 1, 2, 3]


def test_the_lines_of_a_stream():
    lines = [
        "retry: 1",
        "",
        ": alive",
        "",
        "id: 1",
        "event: a",
        "data: {}",
        "",
        "event: b",
        'data: {"x": 1}',
        "",
        "data: 3",
    ]
    assert list(_parsed(iter(lines))) == [("1", "a", "{}"), (None, "b", '{"x": 1}')]


# Commands


def test_submit_sends_the_files_and_reports_all_mistakes(cook, inputs, live, tmp_path, monkeypatch):
    job = submitted(cook, inputs, "--set", "training.steps=7", "--name", "named", "--priority", "3")
    made = live.controller.get(job["id"])
    config = json.loads((made.folder / "config" / "bmcook.json").read_text())
    assert config["training"]["steps"] == 7 and made.name == "named" and made.priority == 3
    code, out, _ = cook("submit", inputs / "bmcook.json")
    assert code == 0 and "is queued" in out and "/jobs/" in out
    code, _, err = cook("submit", inputs / "bmcook.json", "--set", "training.steps=0", "--set", "data.max_length=0")
    assert code == 2 and "training.steps" in err and "data.max_length" in err and "Traceback" not in err
    code, _, err = cook("submit", tmp_path / "none.json")
    assert code == 2 and "no such file" in err
    code, out, _ = cook("submit", inputs / "bmcook.json", "--dry-run")
    assert code == 0 and "pretrain" in out and "ranks" in out
    code, out, _ = cook("submit", inputs / "bmcook.json", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["stages"]


def test_files_that_a_recipe_names_are_put_in(tmp_path, monkeypatch):
    write_run(tmp_path, SMALL)
    config = json.loads((tmp_path / "bmcook.json").read_text())
    (tmp_path / "engine.json").write_text('{"zero_optimization": {"stage": 1}}')
    (tmp_path / "model.json").write_text(json.dumps(config["model"]["config"]))
    (tmp_path / "other.json").write_text((tmp_path / "l0_pruning.json").read_text().replace("0.35", "0.5"))
    config |= {"deepspeed": "engine.json"}
    config["model"]["config"] = "model.json"
    (tmp_path / "bmcook.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    path = Path("bmcook.json")
    sent = bundle(path, ["deepspeed.gradient_clipping=2", "pruning.l0_pruning=other.json", "gates.ramp=0.3"], here=True)
    assert sent["config"]["deepspeed"] == {"zero_optimization": {"stage": 1}, "gradient_clipping": 2}
    assert sent["config"]["model"]["config"]["dim_ff"] == 24
    assert sent["scheme"]["coarse-grained"]["target_sparsity"] == 0.5 and sent["scheme"]["gates"] == {"ramp": 0.3}
    assert sent["config"]["data"]["paths"] == [str(tmp_path / "docs")]
    assert bundle(path, here=False)["config"]["data"]["paths"] == ["docs"]
    with pytest.raises(UserErrors, match="2 errors"):
        bundle(path, ["x", "training.steps.y=1"], here=True)


def test_jobs_stop_resume_and_gc(cook, inputs, live):
    job = submitted(cook, inputs)
    code, out, _ = cook("jobs")
    assert code == 0 and job["id"] in out and "queued" in out
    assert job["id"] in [each["id"] for each in json.loads(cook("jobs", "--json", "--state", "queued")[1])]
    assert cook("stop", job["id"])[1].startswith(f"job {job['id']} is stopped")
    code, _, err = cook("stop", job["id"])
    assert code == 2 and "has ended" in err
    assert json.loads(cook("resume", job["id"], "--json")[1])["state"] == "queued"
    cook("stop", job["id"], "--now")
    assert job["id"] not in cook("gc")[1]  # it has just ended
    assert cook("gc", "--state", "running")[0] == 2
    code, out, _ = cook("gc", "--days", "0", "--dry-run")
    assert f"would remove {job['id']}" in out and live.controller.get(job["id"])
    code, out, _ = cook("gc", "--days", "0", "--json")
    assert code == 0 and job["id"] in [each["id"] for each in json.loads(out)]
    for command in (["watch"], ["logs"], ["stop"], ["resume"]):
        code, _, err = cook(*command, job["id"])
        assert code == 2 and "cook jobs" in err
    assert cook("stop", "../../x")[0] == 2


def test_downloads_are_checked_and_continued(cook, client, live, inputs, tmp_path):
    job = live.job(recipe(inputs, SMALL))
    code, _, err = cook("get", job.id, tmp_path)
    assert code == 2 and "no results" in err
    contents = {"pruned/model.bin": os.urandom(300_000), "report/empty": b"", "report/a b%.md": b"text"}
    entries = []
    for name, content in contents.items():
        path = job.folder / "run" / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        entries.append({"name": name, "path": f"out/{name}", "bytes": len(content), "sha256": digest})
    (job.folder / "run" / "artifacts.json").write_text(json.dumps(entries))
    part = tmp_path / "here" / "pruned" / ".model.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(contents["pruned/model.bin"][:200_000])
    sent = []
    client._http.event_hooks["response"].append(lambda answer: sent.append(answer.headers.get("content-range")))
    assert client.download(job.id, entries[0], tmp_path / "here", print)
    assert sent == ["bytes 200000-299999/300000"] and not part.exists()
    code, out, _ = cook("get", job.id, tmp_path / "here")
    assert code == 0 and "(was there)" in out
    for name, content in contents.items():
        assert (tmp_path / "here" / name).read_bytes() == content
    part.write_bytes(b"x" * 200_000)  # of another file
    (tmp_path / "here" / "pruned" / "model.bin").unlink()
    code, _, err = cook("get", job.id, tmp_path / "here", "--only", "pruned", "--json")
    assert code == 0 and "checksum" in err
    assert (tmp_path / "here" / "pruned" / "model.bin").read_bytes() == contents["pruned/model.bin"]
    (job.folder / "run" / "out" / "pruned" / "model.bin").write_bytes(b"y" * 300_000)
    code, _, err = cook("get", job.id, tmp_path / "there", "--only", "pruned")
    assert (
        code == 1
        and "could not be downloaded whole" in err
        and not (tmp_path / "there" / "pruned" / "model.bin").exists()
    )
    assert cook("get", job.id, tmp_path, "--only", "nothing")[0] == 2


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b", "", ".", "a\\b", "link/x"])
def test_a_dishonest_server_cannot_write_elsewhere(client, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    entry = {"name": name, "path": "x", "bytes": 0, "sha256": "0"}
    with pytest.raises(UserError):
        client.download("aaaaaaaaaaaa", entry, tmp_path / "folder", print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_a_missing_extra_is_a_mistake_with_its_remedy(cook, monkeypatch):
    from cook.commands import service

    monkeypatch.setattr(service, "NEEDED", ("json", "not_installed_here"))
    code, _, err = cook("jobs")
    assert code == 2 and "pip install 'cook[serve]'" in err


# A job of a stand-in program


def test_watch_and_logs_until_the_end(tmp_path, inputs, capsys, monkeypatch, cook):
    with serving(tmp_path / "home", roots=[inputs], executor=local()) as live:
        monkeypatch.setenv("COOK_HOME", str(tmp_path / "home"))
        # The stand-in reads its own keys, which the checks of a submission would refuse.
        spec = {"name": "x", "owner": "admin", "executor": "local", "gpus": 0, "processes": 1, "slurm": {}, "plan": {}}
        good = live.controller.submit({**spec, "stop_grace": 20.0}, {"seconds": 1.0}, {})
        bad = live.controller.submit({**spec, "stop_grace": 20.0}, {"seconds": 0.1, "code": 1}, {})
        code, out, _ = cook("watch", good.id)
        assert code == 0 and "-- running" in out and out.rstrip().splitlines()[-1].startswith("-- succeeded")
        code, out, _ = cook("watch", bad.id, "--json")
        events = [json.loads(line) for line in out.splitlines()]
        assert code == 1 and events[-1]["event"] == "job" and events[-1]["state"] == "failed"
        code, out, _ = cook("logs", "-f", good.id)
        assert code == 0 and out == (good.folder / "attempts" / "1" / "output.log").read_text()
        rest = [json.loads(line) for line in cook("logs", good.id, "--json", "--tail", "5")[1].splitlines()]
        assert "".join(piece["text"] for piece in rest) == out[-5:]


def test_ctrl_c_leaves_the_job_running(tmp_path, inputs):
    with serving(tmp_path / "home", roots=[inputs], executor=local()) as live:
        spec = {"name": "x", "owner": "admin", "executor": "local", "gpus": 0, "processes": 1, "slurm": {}, "plan": {}}
        job = live.controller.submit({**spec, "stop_grace": 20.0}, {"seconds": 60}, {})
        variables = own_environment(COOK_HOME=str(tmp_path / "home"), PYTHONUNBUFFERED="1")
        command = [sys.executable, "-m", "cook", "watch", job.id]
        # Tests that a shell started in the background ignore SIGINT, and programs inherit that.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True, preexec_fn=heed) as watching:
            assert watching.stdout is not None
            lines = []
            for line in watching.stdout:
                lines.append(line)
                if "-- running" in line:
                    break
            watching.send_signal(signal.SIGINT)
            rest = watching.communicate(timeout=20)[0]
        assert watching.returncode == 0 and f"cook watch {job.id}" in rest
        assert live.controller.get(job.id).state == "running"
        live.controller.stop(job.id, now=True)
        wait_for(lambda: live.controller.get(job.id).state == "stopped", "the end of the job")


# The server command


def test_serve_ends_at_sigterm_and_its_jobs_continue(tmp_path, inputs):
    home = tmp_path / "home"
    variables = own_environment(COOK_HOME=str(home), PYTHONUNBUFFERED="1")
    command = [sys.executable, "-m", "cook", "serve", "--port", "0", "--json", "--root", str(inputs)]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        facts = json.loads(server.stdout.readline())
        assert facts["home"] == str(home) and facts["roots"] == [str(inputs)]
        token = (home / "token").read_text().split()[0]
        second = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        assert second.returncode == 2 and "home" in second.stderr and "Traceback" not in second.stderr
        with Client(facts["url"], token) as client:
            wait_for(lambda: client._request("GET", "/v1/health").is_success)
            assert client._http.get(facts["login"]).status_code == 200
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=20)
        assert server.returncode == 0 and "Traceback" not in err and time.monotonic() - began < 10
    assert not (home / "server.json").exists()


@pytest.mark.parametrize(
    "options", [["--host", "0.0.0.0"], ["--root", "/nothing/here"], ["--tls-cert", "x"], ["--host", "host.invalid"]]
)
def test_serve_refuses_options_that_are_not_safe(cook, tmp_path, options):
    code, out, err = cook("serve", "--home", tmp_path / "home", "--port", "0", *options)
    assert code == 2 and out == "" and "Traceback" not in err


def test_a_port_that_is_taken(cook, live, tmp_path):
    code, _, err = cook("serve", "--home", tmp_path / "home", "--port", live.port)
    assert code == 2 and "--port" in err


# The whole path


def test_a_recipe_from_its_submission_to_its_files(tmp_path, inputs, cook, monkeypatch):
    supervisor = (*SUPERVISOR, "--python", interpreter())
    planner = Planner()
    try:
        executor = LocalExecutor(gpus=(), supervisor=supervisor)
        with serving(tmp_path / "home", roots=[inputs], plan=planner, executor=executor) as live:
            monkeypatch.setenv("COOK_HOME", str(tmp_path / "home"))
            steps = ["--set", "training.steps=3", "--set", "training.eval_rows=0"]
            code, out, err = cook("submit", inputs / "bmcook.json", *steps, "--watch", "--retries", 0)
            assert code == 0, out + err
            job = live.controller.list()[0]
            assert job.state == "succeeded" and job.spec["reshape"] is True
            for stage in SMALL:
                answer = live.http.get(f"/v1/jobs/{job.id}/metrics", params={"stage": stage}).json()
                assert [record["step"] for record in answer["records"] if "loss" in record] == [1, 2, 3]
            gates = live.http.get(f"/v1/jobs/{job.id}/structure", params={"stage": "layer_mask"}).json()
            assert gates["groups"] and gates["records"]
            code, out, err = cook("get", job.id, tmp_path / "results")
            assert code == 0, err
            names = {path.relative_to(tmp_path / "results").as_posix() for path in (tmp_path / "results").rglob("*.*")}
            assert {"config/bmcook.json", "masks/layer.pt", "report/report.md"} <= names
            assert any(name.startswith("pruned/") for name in names)
            assert len(live.http.get(f"/jobs/{job.id}").text) > 1000
    finally:
        planner.close()
