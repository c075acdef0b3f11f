"""`cook serve` as a process that ends while a job runs, and as a server with a certificate."""

from __future__ import annotations

import re
import signal
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from cook.base.errors import UserError
from cook.service.client import Client
from cook.service.jobs import JobStore
from cook.service.server import Options, Server
from tests.service.live import served, serving
from tests.service.parts import create, exit_of, ledger, supervisor_of, wait_for, wait_ledger


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_continues_when_its_server_ends_and_the_next_server_shows_and_stops_it(tmp_path, way):
    home = tmp_path / "home"
    job = create(JobStore(home), {"seconds": 60})
    with served(home) as (server, client):
        wait_ledger(job)
        wait_for(lambda: client.job(job.id)["state"] == "running", "the state")
        with client._http.stream("GET", "/v1/events") as page:
            assert next(page.iter_lines())
            server.send_signal(way)
            assert server.wait(20) == (0 if way == signal.SIGTERM else -signal.SIGKILL)
    assert JobStore(home).get(job.id).state == "running" and supervisor_of(job).fate() == "alive"
    with served(home) as (server, client):
        shown = client.job(job.id)
        assert (shown["state"], shown["attempt"]) == ("running", 1)
        client.stop(job.id)
        wait_for(lambda: client.job(job.id)["state"] == "stopped", "the stop")
    assert exit_of(job)["outcome"] == 75 and len(ledger(job)) == 2, "it was stopped, and never started again"
    assert "Traceback" not in (tmp_path / "errors").read_text()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """A folder with the certificates and keys of two authorities, and of a server that the first one has signed."""
    folder = tmp_path_factory.mktemp("certificates")

    def make(name: str, *options: str) -> None:
        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"]
        command = ["openssl", "req", "-x509", *new, *files, *options]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    for name in ("authority", "other"):
        make(name, "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    uses = ["basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature", "subjectAltName=IP:127.0.0.1"]
    signed = ["-CA", "authority.pem", "-CAkey", "authority.key"]
    make("server", *signed, *(word for use in uses for word in ("-addext", use)))
    return folder


def test_a_server_with_a_certificate(tmp_path, certificates, capfd, monkeypatch):
    options = {"tls_cert": certificates / "server.pem", "tls_key": certificates / "server.key"}
    known, unknown = (ssl.create_default_context(cafile=certificates / f"{n}.pem") for n in ("authority", "other"))
    with serving(tmp_path, **options) as live:
        assert live.url.startswith("https://127.0.0.1:")
        with httpx.Client(base_url=live.url, verify=known, trust_env=False) as browser:
            answer = browser.get(live.server.login_link)
            assert answer.status_code == 200 and "; Secure" in answer.headers["set-cookie"]
            assert browser.get("/v1/jobs").json()["jobs"] == []
            assert browser.post("/v1/login-links", headers={"Origin": live.url}).status_code == 201
            plain = {"Origin": live.url.replace("https", "http")}
            assert browser.post("/v1/login-links", headers=plain).status_code == 403
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(live.url, verify=unknown, trust_env=False)
        with pytest.raises(httpx.TransportError):
            httpx.get(live.url.replace("https", "http"), trust_env=False)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "authority.pem"))
        with Client(live.url, live.token, pause=0.01) as client:
            assert list(client.jobs()) == []
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_link_of_a_server_on_all_addresses_has_a_name(tmp_path, certificates):
    files = {"tls_cert": certificates / "server.pem", "tls_key": certificates / "server.key"}
    options = Options(home=tmp_path, host="0.0.0.0", port=0, allow_hosts=["cook.example.org"], **files)
    server = Server(options)
    with server.attached():
        assert re.fullmatch(r"https://cook\.example\.org:\d+/v1/login\?code=.*", server.login_link)
        assert server.url.removeprefix("https://") in server.access.address.hosts


@pytest.mark.parametrize("damage", ["key of another", "password", "text"])
def test_a_certificate_that_cannot_be_used_is_refused_before_anything_listens(tmp_path, certificates, damage):
    key = tmp_path / "key"
    if damage == "key of another":
        key = certificates / "other.key"
    elif damage == "password":
        encrypt = ["openssl", "pkey", "-in", certificates / "server.key", "-aes256", "-passout", "pass:x", "-out", key]
        subprocess.run(encrypt, check=True)
    else:
        key.write_text("no key")
    with pytest.raises(UserError, match="(?s)--tls-cert and --tls-key cannot be used.*wanted"):
        Server(Options(home=tmp_path / "home", port=0, tls_cert=certificates / "server.pem", tls_key=key))
    assert not (tmp_path / "home").exists()
