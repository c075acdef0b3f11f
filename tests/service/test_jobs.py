"""The state of a job is a function of the files in its folder."""

from __future__ import annotations

import json
import multiprocessing
import os

import pytest

from cook.service import jobs
from cook.service.jobs import JobStore, declare_end, job_of, new_id, write_once
from tests.service.parts import create

CLAIMED = {"started": None, "message": "waiting for 2 free GPUs"}
STARTED = {"started": "2026-01-01T00:00:00+00:00", "message": ""}


def ended(outcome: int | None, **more) -> dict:
    return {"code": outcome, "outcome": outcome, "started": "s", "ended": "e", "reason": "because", **more}


@pytest.fixture
def store(tmp_path) -> JobStore:
    return JobStore(tmp_path)


@pytest.mark.parametrize(
    ("wanted", "attempts", "state"),
    [
        (None, [], "queued"),
        (("stop", 1), [], "stopped"),
        (None, [(None, None)], "starting"),
        (None, [(CLAIMED, None)], "starting"),
        (None, [(STARTED, None)], "running"),
        (("stop", 1), [(STARTED, None)], "stopping"),
        (("stop now", 1), [(None, None)], "stopping"),
        (("stop", 1), [(STARTED, None), (STARTED, None)], "running"),  # an old request
        (None, [(STARTED, ended(0))], "succeeded"),
        (("stop", 1), [(STARTED, ended(0))], "succeeded"),  # it was complete before it saw the request
        (None, [(STARTED, ended(1))], "failed"),
        (None, [(STARTED, ended(2))], "failed"),
        (("stop", 1), [(STARTED, ended(2))], "failed"),
        (("stop", 1), [(STARTED, ended(75))], "stopped"),
        (("stop now", 1), [(STARTED, ended(None, lost=True))], "stopped"),
        (None, [(STARTED, ended(75))], "requeued"),
        (None, [(STARTED, ended(76))], "requeued"),
        (None, [(STARTED, ended(None, lost=True))], "requeued"),
        (None, [(STARTED, ended(None, failed=True))], "failed"),
        (None, [(STARTED, ended(None, cancelled=True))], "stopped"),
        (None, [(STARTED, ended(76))] * 2, "requeued"),
        (None, [(STARTED, ended(76))] * 3, "failed"),  # two retries
        (None, [(STARTED, ended(None, lost=True))] * 3, "lost"),
        (("run", 3), [(STARTED, ended(76))] * 3, "requeued"),  # resumed at 3: the retries count from there
        (("run", 4), [(STARTED, ended(76))] * 3, "queued"),
        (("stop", 2), [(STARTED, ended(76))], "stopped"),  # stopped while it waited for its retry
        (("run", 2), [(STARTED, ended(75))], "queued"),
    ],
)
def test_the_state_follows_from_the_files(store, wanted, attempts, state):
    job = create(store, retries=2)
    for number, (process, end) in enumerate(attempts, start=1):
        store.begin(job.id)
        folder = store.attempt_folder(job.id, number)
        for name, value in (("process.json", process), ("exit.json", end)):
            if value is not None:
                (folder / name).write_text(json.dumps(value))
    if wanted:
        store.want(job.id, *wanted)
    assert store.get(job.id).state == state
    assert store.get(job.id).attempt == len(attempts)


def test_a_job_appears_complete_or_not_at_all(store, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs, "fsync_folder", no_space)
    with pytest.raises(OSError, match="No space left"):
        create(store)
    assert list(store.folder.iterdir()) == []


def test_ids_sort_by_time_and_name_folders_only(store):
    first, second = create(store), create(store)
    assert [job.id for job in store.all()] == sorted([first.id, second.id])
    made = [new_id() for _ in range(300)]
    assert all(jobs.IDENTIFIER.fullmatch(id) for id in made)
    (store.home / "secret").mkdir()
    for id in ("../secret", "..", "", "a" * 11, "A" * 12, first.id + "\n", f"{first.id}/"):
        with pytest.raises(KeyError):
            store.get(id)


def test_of_several_writers_one_writes(tmp_path):
    path = tmp_path / "process.json"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        wrote = pool.starmap(write_once, [(path, {"by": number}) for number in range(40)])
    assert wrote.count(True) == 1
    assert json.loads(path.read_text()) == {"by": wrote.index(True)}
    assert os.listdir(tmp_path) == ["process.json"]


@pytest.mark.parametrize("reserved", [True, False])
def test_a_file_takes_the_space_that_was_reserved_for_it(tmp_path, reserved):
    path = tmp_path / "exit.json"
    if reserved:
        jobs.reserve(path)
        (before,) = tmp_path.iterdir()
        inode, size = before.stat().st_ino, before.stat().st_size
    jobs.write_reserved(path, {"reason": "voll ä"})
    assert jobs.read(path) == {"reason": "voll ä"} and os.listdir(tmp_path) == ["exit.json"]
    assert not reserved or (path.stat().st_ino, path.stat().st_size) == (inode, size)


def test_a_job_whose_spec_is_damaged_stays_visible(store):
    job = create(store)
    (job.folder / "spec.json").write_text("{")
    (found,) = store.all()
    assert found.state == "lost" and "spec.json cannot be read" in found.message


@pytest.mark.parametrize("content", ["", "{}", '{"state": "stop"}', "[1]", '{"state": "fly", "attempt": "x"}'])
def test_a_damaged_request_hides_no_job(store, content):
    job = create(store)
    (job.folder / "wanted.json").write_text(content)
    (found,) = store.all()
    assert found.state == "queued"


def test_removal_hides_the_job_at_once_and_the_next_server_finishes_it(store, monkeypatch):
    job = create(store)
    monkeypatch.setattr(jobs.shutil, "rmtree", lambda *_, **__: None)
    store.remove(job.id)
    assert store.all() == []
    monkeypatch.undo()
    store.clean()
    assert list(store.folder.iterdir()) == []


def test_the_end_of_a_lost_attempt_has_the_outcome_of_the_trainer(store):
    job = create(store)
    store.begin(job.id)
    folder = store.attempt_folder(job.id, 1)
    (folder / "process.json").write_text(json.dumps(STARTED))
    (job.folder / "run" / "out").mkdir()
    (job.folder / "run" / "out" / "outcome.json").write_text(json.dumps({"code": 2, "message": "no such corpus"}))
    assert declare_end(store.get(job.id), "killed")
    assert store.get(job.id).state == "failed" and "no such corpus" in store.get(job.id).message
    assert not declare_end(store.get(job.id), "again"), "the first one stays"


def test_an_outcome_that_an_earlier_attempt_left_is_not_taken(store):
    job = create(store)
    store.begin(job.id)
    (job.folder / "run" / "out").mkdir()
    (job.folder / "run" / "out" / "outcome.json").write_text(json.dumps({"code": 2, "message": "old"}))
    declare_end(store.get(job.id), "killed before it began")
    assert job_of(job.folder).state == "lost"
