"""The index with SQLite and with a PostgreSQL server that the test starts."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from cook.base.errors import UserError
from cook.service.index import Index
from cook.service.jobs import Job, JobStore, new_id
from tests.service.parts import controller, create, spec
from tests.service.postgres import postgres

MANY = 1000


@pytest.fixture(scope="module")
def postgresql():
    pytest.importorskip("psycopg")
    with postgres("-F") as url:
        if url is None:
            pytest.skip("PostgreSQL is not installed")
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request):
    return None if request.param == "sqlite" else request.getfixturevalue("postgresql")


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


def test_a_file_on_a_full_disk_is_not_put_aside(tmp_path, monkeypatch):
    Index(tmp_path).close()
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL

    def refused(_):
        raise sa.exc.OperationalError("INSERT", {}, full)

    monkeypatch.setattr("cook.service.index._open", refused)
    with pytest.raises(UserError, match="disk is full"):
        Index(tmp_path)
    assert [path.name for path in tmp_path.glob("index*")] == ["index.sqlite"]


def test_a_database_that_cannot_be_reached_is_named_without_its_password(tmp_path):
    with pytest.raises(UserError, match="the database cannot be used") as found:
        Index(tmp_path, "postgresql+psycopg://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(found.value)


def test_a_thousand_queued_jobs_are_listed_stopped_and_found_again(tmp_path, url, monkeypatch):
    """How long lists take: scripts/bench/service_lists.py."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    store = JobStore(tmp_path)
    for _ in range(MANY):
        store.create(spec(), {}, {})
    with contextlib.closing(controller(tmp_path, database=url)) as service:
        assert len(service.list(limit=MANY)) == MANY and len(service.list(limit=100, state="queued")) == 100
        for job in service.list(limit=MANY):
            service.stop(job.id)
        assert service.count() == {"stopped": MANY}
    with contextlib.closing(controller(tmp_path, database=url)) as service:
        assert service.count() == {"stopped": MANY}
