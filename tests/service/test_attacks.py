"""Known attacks: by a page of another site, a job, or a client without a token."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time

import pytest

from cook.service import guard
from tests.service.live import serving


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def request(live, method: str, path: str, *headers: str, body: bytes = b"", host: str | None = None) -> bytes:
    """A hand-written request with the token."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host or f'127.0.0.1:{live.port}'}", "Connection: close"]
    lines += [f"Authorization: Bearer {live.token}", *headers]
    return live.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


# Without a token


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs"),
        ("POST", "/v1/jobs"),
        ("POST", "/v1/plan"),
        ("GET", "/v1/jobs/aaaaaaaaaaaa"),
        ("DELETE", "/v1/jobs/aaaaaaaaaaaa"),
        ("POST", "/v1/jobs/aaaaaaaaaaaa/stop"),
        ("POST", "/v1/jobs/aaaaaaaaaaaa/resume"),
        ("GET", "/v1/jobs/aaaaaaaaaaaa/log"),
        ("GET", "/v1/jobs/aaaaaaaaaaaa/artifacts/x"),
        ("GET", "/v1/events"),
        ("POST", "/v1/login-links"),
        ("POST", "/v1/logout"),
        ("GET", "/v1/openapi.json"),
        ("OPTIONS", "/v1/jobs"),
        ("PUT", "/v1/jobs"),
        ("HEAD", "/v1/jobs"),
        ("TRACE", "/"),
    ],
)
def test_every_path_and_method_needs_a_token(live, method, path):
    for token in ({}, {"Authorization": "Bearer wrong"}):
        headers = {"Host": f"127.0.0.1:{live.port}", "Connection": "close"} | token
        head = "\r\n".join(f"{name}: {value}" for name, value in headers.items())
        answer = live.raw(f"{method} {path} HTTP/1.1\r\n{head}\r\n\r\n".encode())
        assert status(answer) == 401


def test_every_route_of_the_application_is_behind_the_guard(live):
    """Also one that is added later."""
    found = set(live.server.app.openapi()["paths"]) | {"/", "/jobs/{id}", "/v1/openapi.json"}
    assert len(found) > 10
    for path in found - {"/v1/health", "/v1/login"}:
        answer = live.http.get(path.replace("{id}", "aaaaaaaaaaaa"), headers={"Authorization": "x"})
        assert answer.status_code in (401, 303), path


def test_pages_lead_to_the_login(live):
    answer = live.http.get("/", headers={"Authorization": "x"}, follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/login"


# From pages of other sites


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "localhost.evil.example"])
def test_other_names_of_the_server_are_refused(live, method, host):
    assert status(request(live, method, "/v1/jobs", host=host)) == 403


def test_a_host_header_must_be_there_once(live):
    own = f"Host: 127.0.0.1:{live.port}"
    assert status(request(live, "GET", "/v1/jobs", own)) == 400
    answer = live.raw(f"GET /v1/jobs HTTP/1.0\r\nAuthorization: Bearer {live.token}\r\n\r\n".encode())
    assert status(answer) == 403


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("origin", ["null", "http://evil.example", "https://127.0.0.1:1"])
def test_other_origins_are_refused(live, method, origin):
    answer = request(live, method, "/v1/jobs/aaaaaaaaaaaa", f"Origin: {origin}")
    assert status(answer) == 403 and b"access-control-allow" not in answer.lower()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_bodies_that_a_form_could_send_are_refused(live, body, kind):
    headers = {"Content-Type": kind} if kind else {}
    for path in ("/v1/jobs", "/v1/login", "/v1/jobs/aaaaaaaaaaaa/stop"):
        answer = live.http.post(path, content=json.dumps(body), headers=headers)
        assert answer.status_code == 415


def test_a_cookie_is_not_enough_for_a_change_from_another_page(live, body):
    cookie = {"Cookie": live.server.access.cookie("admin").split(";")[0], "Authorization": ""}
    own = {"Origin": live.url}
    assert live.http.get("/v1/jobs", headers=cookie).status_code == 200
    assert live.http.post("/v1/jobs", json=body, headers=cookie).status_code == 403
    assert live.http.post("/v1/jobs", json=body, headers=cookie | {"Origin": "http://x"}).status_code == 403
    assert live.http.post("/v1/jobs", json=body, headers=cookie | own).status_code == 201


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/health", "/v1/nothing", "/login", "/", "/static/none"])
def test_every_answer_has_the_headers_that_browsers_obey(live, path):
    for headers in ({}, {"Authorization": "x"}):
        answer = live.http.get(path, headers=headers)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
        assert "server" not in answer.headers


def test_a_login_link_works_once(live):
    path = live.server.login_link.removeprefix(live.url)
    first = live.http.get(path, headers={"Authorization": ""})
    cookie = first.headers["set-cookie"]
    assert first.status_code == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    name, value = cookie.split(";")[0].split("=", 1)
    live.http.cookies.clear()
    assert live.http.get("/v1/jobs", headers={"Authorization": "", "Cookie": f"{name}={value}"}).status_code == 200
    again = live.http.get(path, headers={"Authorization": ""})
    assert again.status_code == 401 and "set-cookie" not in again.headers
    assert live.http.post("/v1/login", json={"code": path.partition("=")[2]}).status_code == 401
    assert live.http.post("/v1/login", json={"token": live.token}).status_code == 204
    assert live.http.post("/v1/login", json={"token": live.token[:-1]}).status_code == 401
    assert live.http.post("/v1/login", json={}).status_code == 401
    live.http.cookies.clear()
    link = live.http.post("/v1/login-links").json()["path"]
    assert live.http.get(link).status_code == 200
    live.http.cookies.clear()


# Bodies


def test_big_bodies_are_refused(live):
    head = ("Content-Type: application/json",)
    assert status(request(live, "POST", "/v1/jobs", *head, "Content-Length: 1000001", body=b"{")) == 413
    big = b'{"config": "' + b"x" * 1_200_000 + b'"}'
    assert status(request(live, "POST", "/v1/jobs", *head, f"Content-Length: {len(big)}", body=big)) == 413
    chunks = b"".join(b"10000\r\n" + b" " * 0x10000 + b"\r\n" for _ in range(20)) + b"0\r\n\r\n"
    assert status(request(live, "POST", "/v1/jobs", *head, "Transfer-Encoding: chunked", body=chunks)) == 413
    small = b'e\r\n{"config": {}}\r\n0\r\n\r\n'
    assert status(request(live, "POST", "/v1/jobs", *head, "Transfer-Encoding: chunked", body=small)) == 422


def test_two_lengths_and_smuggled_requests(live):
    head = ("Content-Type: application/json",)
    for pair in (("Content-Length: 2", "Content-Length: 3"), ("Content-Length: -1",), ("Content-Length: x",)):
        assert status(request(live, "POST", "/v1/jobs", *head, *pair, body=b"{}")) == 400
    both = ("Content-Length: 4", "Transfer-Encoding: chunked")
    answer = request(live, "POST", "/v1/jobs", *head, *both, body=b"0\r\n\r\nGET /v1/health HTTP/1.1\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") <= 2 and b'"status"' not in answer


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff",
        b'"\\ud800"',
        b'{"config": {"a": 1, "a": 2}}',
        b'{"config": {"a": NaN}}',
        b'{"config": {"a": 1e999}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        b"null",
        b"[]",
    ],
)
def test_odd_json_is_a_mistake_and_no_failure(live, content):
    answer = live.http.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and answer.json()["problems"]


def test_a_body_that_does_not_arrive(tmp_path, inputs, monkeypatch):
    monkeypatch.setitem(guard.Guard.__init__.__kwdefaults__, "body_timeout", 0.3)
    with serving(tmp_path, roots=[inputs]) as live:
        answer = request(live, "POST", "/v1/jobs", "Content-Type: application/json", "Content-Length: 10", body=b"{")
        assert status(answer) == 408


# Files


@pytest.fixture
def finished(live, body, tmp_path):
    """A job whose manifest and files the job itself has forged."""
    job = live.job(body)
    run = job.folder / "run"
    (run / "out").mkdir()
    (run / "out" / "good").write_text("good")
    (tmp_path / "secret").write_text("secret")
    (run / "out" / "link").symlink_to(tmp_path / "secret")
    (run / "out" / "folder").symlink_to(tmp_path)
    (run / "out" / "home").symlink_to(live.server.options.home)
    os.mkfifo(run / "out" / "pipe")
    paths = ["out/good", "out/link", "out/folder/secret", "out/home/token", "out/pipe", "out", "../spec.json"]
    paths += ["../../../token", "/etc/passwd", "out/../../spec.json", "", "out/none"]
    entry = {"bytes": 4, "sha256": hashlib.sha256(b"good").hexdigest()}
    listed = [{"name": f"file{number}", "path": path, **entry} for number, path in enumerate(paths)]
    (run / "artifacts.json").write_text(
        json.dumps([*listed, {"name": "../x", "path": "out/good", **entry}, 3, {"a": 1}])
    )
    return job, len(paths)


def test_a_manifest_cannot_name_files_outside(live, finished):
    job, count = finished
    path = f"/v1/jobs/{job.id}/artifacts"
    assert live.http.get(f"{path}/file0").text == "good"
    for number in range(1, count):
        answer = live.http.get(f"{path}/file{number}")
        assert answer.status_code == 404 and "secret" not in answer.text


@pytest.mark.parametrize(
    "name",
    [
        "../../../token",
        "..%2f..%2f..%2ftoken",
        "%2e%2e/%2e%2e/spec.json",
        "....//....//token",
        "..\\..\\token",
        "%5c..%5ctoken",
        "/etc/passwd",
        "//etc/passwd",
        "%2fetc%2fpasswd",
        "file0%00",
        "file0/../../spec.json",
        "out/good",
        "http://evil.example/",
        "file:///etc/passwd",
        "#",
        "?",
        "",
    ],
)
def test_only_names_of_the_manifest_are_served(live, finished, name):
    job, _ = finished
    for path in (f"/v1/jobs/{job.id}/artifacts/{name}", f"/static/{name}"):
        answer = request(live, "GET", path)
        # The empty name is the list itself.
        assert status(answer) in (303, 307, 404, 405, 422) or (b'"file0"' in answer and not name.strip("#?"))
        assert b"root:" not in answer and live.token.encode() not in answer and b"idempotency" not in answer


def test_a_manifest_that_is_a_link(live, body):
    job = live.job(body)
    (job.folder / "run" / "artifacts.json").symlink_to(live.server.options.home / "token")
    assert live.http.get(f"/v1/jobs/{job.id}/artifacts").json() == []
    stage = job.folder / "run" / "out" / "pretrain"
    stage.mkdir(parents=True)
    for name in ("log.jsonl", "gates.json", "gates.bin"):
        (stage / name).symlink_to(job.folder / "spec.json")
    assert live.http.get(f"/v1/jobs/{job.id}/metrics", params={"stage": "pretrain"}).json()["records"] == []
    assert live.http.get(f"/v1/jobs/{job.id}/structure", params={"stage": "pretrain"}).json()["groups"] == []


# Names


@pytest.mark.parametrize(
    "name",
    [
        "$(touch hacked)",
        "`touch hacked`",
        "; touch hacked",
        "a' || touch hacked #",
        "../../x",
        "<script>alert(1)</script>",
    ],
)
def test_names_are_only_shown(live, body, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = live.job(body | {"name": name})
    assert job.name == name and live.http.get(f"/v1/jobs/{job.id}").json()["name"] == name
    assert not list(live.server.options.home.rglob("hacked")) and os.listdir(tmp_path) == []
    for path in ("/", f"/jobs/{job.id}"):
        page = live.http.get(path)
        assert page.status_code == 200 and "<script>alert" not in page.text


# Load


def test_slow_clients_do_not_block_others(live):
    sockets = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(100)]
    try:
        for each in sockets:
            each.sendall(b"GET /v1/health HTTP/1.1\r\nHost: ")
        began = time.monotonic()
        assert live.http.get("/v1/health").is_success and time.monotonic() - began < 5
    finally:
        for each in sockets:
            each.close()
    assert threading.active_count() < 100
