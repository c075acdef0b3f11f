"""The index with SQLite and with a PostgreSQL server that the test starts."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from cook.base.errors import UserError
from cook.service.index import Index
from cook.service.jobs import Job, JobStore, new_id
from tests.service.parts import controller, create, spec, wait_for

MANY = 1000
LATENCY = 0.2  # seconds for a list


def command(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@pytest.fixture(scope="module")
def postgres():
    """The URL of a server in a folder of its own. PostgreSQL refuses to run as root."""
    server, maker = command("postgres"), command("initdb")
    if not server or not maker:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    user, prefix = pwd.getpwuid(os.getuid()).pw_name, []
    folder = Path(tempfile.mkdtemp(prefix="cook-pg-", dir="/tmp"))
    if os.getuid() == 0:
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            account = pwd.getpwnam("nobody")
        user = account.pw_name
        prefix = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        os.chown(folder, account.pw_uid, account.pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, where = str(folder / "data"), {"cwd": "/", "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*prefix, maker, "-D", data, "-A", "trust", "-N", "-U", user], check=True, **where)
    url = f"postgresql+psycopg://{user}@127.0.0.1:{port}/postgres"
    options = ["-D", data, "-p", str(port), "-k", str(folder), "-h", "127.0.0.1", "-F"]
    process = subprocess.Popen([*prefix, server, *options], **where)
    try:
        wait_for(lambda: answers(url), "the server")
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # does not wait for connections
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    engine = sa.create_engine(url)
    try:
        engine.connect().close()
    except sa.exc.OperationalError:
        return False
    finally:
        engine.dispose()
    return True


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request):
    return None if request.param == "sqlite" else request.getfixturevalue("postgres")


@pytest.fixture
def index(url, tmp_path):
    made = Index(tmp_path, url)
    made.replace([])
    yield made
    made.close()


def row(tmp_path: Path, **changes) -> Job:
    store = JobStore(tmp_path)
    return replace(create(store), **changes)


def test_a_row_is_the_job(index, tmp_path):
    job = row(tmp_path, message="läuft", started="2026-01-01T00:00:00+00:00")
    index.put([job])
    assert index.get(job.id) == job
    changed = replace(job, state="running")
    index.put([changed])
    assert index.list() == [changed]
    index.delete(job.id)
    with pytest.raises(KeyError):
        index.get(job.id)


def test_lists_are_pages_newest_first(index, tmp_path):
    first = row(tmp_path)
    jobs = [replace(first, id=new_id() if n else first.id, owner="ab"[n % 2]) for n in range(5)]
    jobs.sort(key=lambda job: job.id, reverse=True)
    index.put([replace(job, folder=tmp_path / "jobs" / job.id) for job in jobs])
    ids = [job.id for job in jobs]
    assert [job.id for job in index.list()] == ids
    assert [job.id for job in index.list(limit=2, after=ids[1])] == ids[2:4]
    assert [job.id for job in index.list(owner="a")] == [job.id for job in jobs if job.owner == "a"]
    assert index.list(state=("running", "failed")) == [] and len(index.list(state="queued")) == 5


def test_waiting_jobs_come_by_priority_then_age(index, tmp_path):
    old, urgent, new, ended = (row(tmp_path) for _ in range(4))
    index.put([old, replace(urgent, priority=5), replace(new, state="requeued"), replace(ended, state="failed")])
    assert [job.id for job in index.waiting("local", 10)] == [urgent.id, old.id, new.id]
    assert index.waiting("slurm", 10) == []


@pytest.mark.parametrize("damage", ["text", "page", "newer"])
def test_an_unusable_file_is_put_aside_and_filled_again(tmp_path, damage):
    service = controller(tmp_path)
    job = service.submit(spec(), {}, {})
    service.close()
    path = tmp_path / "index.sqlite"
    if damage == "text":
        path.write_text("this is not a database")
    elif damage == "page":
        content = bytearray(path.read_bytes())
        content[4096:12288] = os.urandom(8192)
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.close()
    again = controller(tmp_path)
    assert [each.id for each in again.list()] == [job.id]
    again.close()
    assert list(tmp_path.glob("index.sqlite.unusable-*"))


def test_a_database_that_cannot_be_reached_is_named_without_its_password(tmp_path):
    with pytest.raises(UserError, match="the database cannot be used") as found:
        Index(tmp_path, "postgresql+psycopg://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(found.value)


def test_a_thousand_queued_jobs_are_listed_at_once_stopped_and_found_again(tmp_path, url, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what is measured is the index, not the disk of this machine
    store = JobStore(tmp_path)
    plan = {"stages": [{"name": "x" * 40}] * 20}
    for _ in range(MANY):
        store.create(spec(plan=plan), {}, {})
    with contextlib.closing(controller(tmp_path, database=url)) as service:
        assert best(lambda: len(service.list(limit=MANY)), MANY) < LATENCY
        assert best(lambda: len(service.list(limit=100, state="queued")), 100) < LATENCY / 4
        for job in service.list(limit=MANY):
            service.stop(job.id)
        assert service.count() == {"stopped": MANY}
    with contextlib.closing(controller(tmp_path, database=url)) as service:
        assert service.count() == {"stopped": MANY}


def best(call: Callable[[], object], wanted: object) -> float:
    """The shortest of several durations: other programs share this machine."""
    durations = []
    for _ in range(7):
        started = time.perf_counter()
        assert call() == wanted
        durations.append(time.perf_counter() - started)
    return min(durations)
