"""The interface of a running server: submission, jobs, files, and the errors."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from cook.service.api import Limits
from cook.service.controller import Controller
from cook.service.jobs import read
from tests.service.live import quick_plan, serving
from tests.service.parts import wait_for
from tests.service.test_tails import write_gates


def names(live) -> set[str]:
    return {path.name for path in live.controller.store.folder.iterdir()}


def test_a_submission_becomes_a_job_with_its_plan(live, body, inputs):
    answer = live.submit(body)
    job = answer.json()
    assert answer.status_code == 201 and answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["state"] == "queued" and job["owner"] == "admin" and job["plan"]["stages"][0]["stage"] == "pretrain"
    folder = live.controller.get(job["id"]).folder
    config = read(folder / "config" / "bmcook.json")
    assert config["output_dir"] == "out" and config["data"]["paths"] == [str(inputs / "docs")]
    assert live.http.get(f"/v1/jobs/{job['id']}").json() == job
    assert job in live.http.get("/v1/jobs").json()["jobs"]


def test_a_refused_submission_lists_all_mistakes_and_leaves_nothing(live, body):
    before = names(live)
    answer = live.submit(body | {"set": ["training.steps=0", "model.path=/etc", "nonsense"], "gpus": 4})
    problems = "\n".join(answer.json()["problems"])
    assert answer.status_code == 422 and answer.json()["error"]
    assert all(part in problems for part in ("training.steps", "model.path", "nonsense", "GPUs"))
    answer = live.submit({"config": 3, "gpus": -1, "what": 1})
    assert answer.status_code == 422 and len(answer.json()["problems"]) == 3
    assert names(live) == before


def test_the_same_key_leads_to_the_same_job(live, body):
    first = live.submit(body, **{"Idempotency-Key": "one"})
    again = live.submit(body, **{"Idempotency-Key": "one"})
    assert (first.status_code, again.status_code) == (201, 200) and first.json()["id"] == again.json()["id"]
    other = live.submit(body | {"priority": 3}, **{"Idempotency-Key": "one"})
    assert other.status_code == 409 and "key" in other.json()["error"]
    assert live.submit(body, **{"Idempotency-Key": "two"}).json()["id"] != first.json()["id"]
    for key in ("x" * 201, "a b", ""):
        assert live.submit(body, **{"Idempotency-Key": key}).status_code == 422


def test_requests_with_one_key_at_the_same_time_make_one_job(live, body):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: live.submit(body, **{"Idempotency-Key": "race"}), range(8)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]


def test_a_repeated_request_is_not_planned_again(tmp_path, inputs, body):
    plans = []

    def counted(*arguments):
        plans.append(arguments)
        return quick_plan(*arguments)

    with serving(tmp_path, plan=counted, roots=[inputs]) as live:
        for _ in range(3):
            assert live.submit(body, **{"Idempotency-Key": "one"}).is_success
        assert len(plans) == 1
        assert live.http.post("/v1/plan", json=body).json()["ranks"] == 1 and len(plans) == 2
        assert len(live.http.get("/v1/jobs").json()["jobs"]) == 1


def test_the_pages_of_a_list(live, body):
    ids = [live.job(body).id for _ in range(5)]
    seen, after = [], None
    while True:
        query = {"limit": 2} | ({"after": after} if after else {})
        page = live.http.get("/v1/jobs", params=query).json()
        seen += [job["id"] for job in page["jobs"]]
        if (after := page["next"]) is None:
            break
    assert seen == sorted(seen, reverse=True) and set(ids) <= set(seen) == {job.id for job in live.controller.list()}
    assert live.http.get("/v1/jobs", params={"owner": "nobody"}).json() == {"jobs": [], "next": None}
    assert live.http.get("/v1/jobs", params={"state": ["running", "failed"]}).json()["jobs"] == []
    assert live.http.get("/v1/jobs", params={"state": "flying"}).status_code == 422


def test_stop_resume_and_remove(live, body):
    job = live.job(body)
    path = f"/v1/jobs/{job.id}"
    assert live.http.post(f"{path}/resume").status_code == 409
    assert live.http.delete(path).status_code == 409
    assert live.http.post(f"{path}/stop", json={"now": True}).json()["state"] == "stopped"
    assert live.http.post(f"{path}/stop").status_code == 409
    assert live.http.post(f"{path}/stop", json={"now": 1}).status_code == 422
    assert live.http.post(f"{path}/resume").json()["state"] == "queued"
    assert live.http.post(f"{path}/stop").json()["state"] == "stopped"
    assert live.http.delete(path).status_code == 204 and not job.folder.exists()
    for method, more in (("GET", ""), ("POST", "/stop"), ("POST", "/resume"), ("DELETE", ""), ("GET", "/log")):
        answer = live.http.request(method, path + more)
        assert answer.status_code == 404 and job.id in answer.json()["error"]


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/jobs/../../etc/passwd", "/v1/jobs/%2e%2e%2fx", "/v1/jobs/UPPER"])
def test_unknown_paths(live, path):
    answer = live.http.get(path)
    assert answer.status_code in (404, 422) and answer.json()["error"]


def test_the_log_by_offset(live, body):
    job = live.job(body)
    path = f"/v1/jobs/{job.id}/log"
    assert live.http.get(path).text == ""
    folder = job.folder / "attempts" / "1"
    folder.mkdir(parents=True)
    (folder / "output.log").write_text("one\ntwo €\n")
    first = live.http.get(path, params={"attempt": 1})
    assert first.text == "one\ntwo €\n" and first.headers["x-next-offset"] == "12"
    assert first.headers["content-type"] == "text/plain; charset=utf-8"
    rest = live.http.get(path, params={"attempt": 1, "offset": 4})
    assert rest.text == "two €\n" and live.http.get(path, params={"attempt": 1, "offset": 12}).text == ""
    assert live.http.get(path, params={"attempt": 1, "offset": -5}).text == " €\n"
    assert live.http.get(path, params={"attempt": 2}).text == ""


def test_metrics_and_structure(live, body):
    job = live.job(body)
    path = f"/v1/jobs/{job.id}"
    assert live.http.get(f"{path}/metrics", params={"stage": "pretrain"}).json()["records"] == []
    assert live.http.get(f"{path}/structure", params={"stage": "pretrain"}).json()["records"] == []
    assert live.http.get(f"{path}/metrics", params={"stage": "../../x"}).status_code == 422
    stage = job.folder / "run" / "out" / "pretrain"
    stage.mkdir(parents=True)
    (stage / "log.jsonl").write_text("".join(f'{{"step": {n}, "text": "{"x" * 1000}"}}\n' for n in range(500)))
    write_gates(job.folder, range(10))
    assert len(live.http.get(f"{path}/metrics", params={"stage": "pretrain"}).json()["records"]) == 500
    found = live.http.get(f"{path}/structure", params={"stage": "pretrain", "after": 6}).json()
    assert [record["step"] for record in found["records"]] == [7, 8, 9] and len(found["groups"]) == 2


def finished(live, body, content: bytes):
    job = live.job(body)
    run = job.folder / "run"
    (run / "out" / "pruned").mkdir(parents=True)
    (run / "out" / "pruned" / "model.bin").write_bytes(content)
    entry = {"name": "pruned/model.bin", "path": "out/pruned/model.bin", "bytes": len(content)}
    entry |= {"sha256": hashlib.sha256(content).hexdigest()}
    (run / "artifacts.json").write_text(json.dumps([entry]))
    return job, f"/v1/jobs/{job.id}/artifacts", entry


def test_artifacts_whole_and_in_ranges(live, body):
    content = bytes(range(256)) * 1000
    _, path, entry = finished(live, body, content)
    assert live.http.get(path).json() == [entry]
    whole = live.http.get(f"{path}/pruned/model.bin")
    assert whole.content == content and whole.headers["etag"] == f'"{entry["sha256"]}"'
    assert whole.headers["content-type"] == "application/octet-stream"
    assert (
        "attachment" in whole.headers["content-disposition"] and "sandbox" in whole.headers["content-security-policy"]
    )

    def part(wanted, **more):
        return live.http.get(f"{path}/pruned/model.bin", headers={"Range": wanted} | more)

    assert part("bytes=1000-1999").content == content[1000:2000] and part("bytes=1000-1999").status_code == 206
    assert part("bytes=255000-").content == content[255000:] and part("bytes=-10").content == content[-10:]
    assert part("bytes=255000-", **{"If-Range": whole.headers["etag"]}).status_code == 206
    assert part("bytes=255000-", **{"If-Range": '"other"'}).content == content
    assert part(f"bytes={len(content)}-").status_code == 416 and part("bytes=5-3").status_code == 400
    assert part("lines=1-2").status_code == 400 and part(f"bytes={'0-1,' * 200}").status_code in (200, 206)
    head = live.http.get(f"{path}/none")
    assert head.status_code == 404


def test_no_file_stays_open_after_downloads(live, body):
    _, path, _ = finished(live, body, b"x" * 300_000)
    live.http.get(f"{path}/pruned/model.bin")

    def held() -> list[str]:
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return [name for link in links if os.path.lexists(link) and (name := os.readlink(link)).endswith("model.bin")]

    for headers in ({}, {"Range": "bytes=0-1"}, {"Range": "bytes=9-1"}, {"Range": "bytes=999999-"}):
        live.http.get(f"{path}/pruned/model.bin", headers=headers)
    wait_for(lambda: not held(), "closed files")


def test_limits_of_an_owner(tmp_path, inputs, body):
    with serving(tmp_path, roots=[inputs], limits=Limits(jobs=2)) as live:
        jobs = [live.job(body) for _ in range(2)]
        refused = live.submit(body, **{"Idempotency-Key": "late"})
        assert refused.status_code == 429 and "limit" in refused.json()["error"]
        live.http.post(f"/v1/jobs/{jobs[0].id}/stop")
        assert live.submit(body, **{"Idempotency-Key": "late"}).status_code == 201
    with serving(tmp_path, roots=[inputs], limits=Limits(free_bytes=2**62)) as live:
        assert live.submit(body).status_code == 507


def test_an_executor_that_is_missing_and_a_failure_of_the_server(live, body, monkeypatch):
    answer = live.submit(body | {"executor": "slurm", "slurm": {"partition": "gpu"}})
    assert answer.status_code == 422 and "executor" in answer.json()["problems"][0]

    def broken(*_, **__):
        raise ValueError("secret detail")

    monkeypatch.setattr(Controller, "list", broken)
    answer = live.http.get("/v1/jobs")
    assert answer.status_code == 500 and "secret" not in answer.text and answer.json()["error"]


def test_the_description_of_the_interface(live):
    paths = live.http.get("/v1/openapi.json").json()["paths"]
    assert {"/v1/jobs", "/v1/jobs/{id}/artifacts/{name}", "/v1/events"} <= set(paths)
    assert live.http.get("/docs").status_code == 404  # its scripts come from another site
