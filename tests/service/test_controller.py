"""Requests, retries, restarts, and what happens to a request when the server is killed between any two steps."""

from __future__ import annotations

import signal
import threading

import pytest

from cook.base.errors import UserError
from cook.service import trees
from cook.service.controller import Conflict
from cook.service.index import DatabaseError
from cook.service.jobs import JobStore, now
from tests.service.parts import controller, create, ledger, local, spec, wait_for, wait_ledger, wait_state


@pytest.fixture
def service(tmp_path):
    made = controller(tmp_path)
    yield made
    made.close()
    trees.send([pid for job in made.store.all() for pid in trees.marked(f"{job.id}/{job.attempt}")], signal.SIGKILL)


def test_a_repeated_submission_is_one_job(service):
    def submit(key="k", body="b", owner="o"):
        return service.submit(spec(owner=owner, idempotency_key=key, body_hash=body), {}, {})

    found = []
    threads = [threading.Thread(target=lambda: found.append(submit().id)) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(set(found)) == 1 == len(service.list())
    with pytest.raises(Conflict, match=found[0]):
        submit(body="another")
    assert submit(owner="p").id != found[0] != submit(key="l").id
    assert submit(key=None).id != submit(key=None).id


def test_a_submission_is_found_again_by_the_next_server(service, tmp_path):
    request = spec(idempotency_key="k", body_hash="b")
    job = JobStore(tmp_path).create(request, {}, {})  # killed before the row was written
    service.close()
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    again = controller(tmp_path)
    assert again.submit(request, {}, {}).id == job.id
    again.close()
    service.__init__(tmp_path)  # for the fixture


def test_what_no_executor_can_run_is_refused(service):
    with pytest.raises(UserError, match="there is no executor 'slurm'"):
        service.submit(spec(executor="slurm"), {}, {})
    with pytest.raises(UserError, match="needs 8 GPUs"):
        service.submit(spec(gpus=8), {}, {})
    assert service.list() == []


def test_a_waiting_job_stops_at_once_and_resumes(service):
    job = service.submit(spec(), {}, {})
    assert service.stop(job.id).state == "stopped"
    with pytest.raises(Conflict, match="has ended: stopped"):
        service.stop(job.id)
    assert service.resume(job.id).state == "queued"
    with pytest.raises(Conflict, match="cannot be resumed: it is queued"):
        service.resume(job.id)
    with pytest.raises(Conflict, match="cannot be removed: it is queued"):
        service.remove(job.id)
    service.stop(job.id, now=True)
    service.remove(job.id)
    for request in (service.get, service.stop, service.resume, service.remove):
        with pytest.raises(KeyError):
            request(job.id)


@pytest.mark.parametrize(
    ("config", "retries", "state", "attempts"),
    [
        ({"code": 76}, 2, "failed", 3),
        ({"code": 75}, 1, "failed", 2),
        ({"code": 1}, 2, "failed", 1),
        ({"code": 2}, 2, "failed", 1),
        ({"kill": 9, "silent": True}, 1, "failed", 2),
        ({}, 2, "succeeded", 1),
    ],
)
def test_only_76_and_an_unasked_75_are_retried(service, config, retries, state, attempts):
    service.start()
    job = wait_state(service, service.submit(spec(retries=retries), config, {}), "failed", "succeeded")
    assert (job.state, job.attempt) == (state, attempts)


def test_a_retry_can_be_stopped(service):
    service._retry_delay = 60.0
    service.start()
    job = wait_state(service, service.submit(spec(retries=5), {"code": 76}, {}), "requeued")
    assert service.stop(job.id).state == "stopped"


def test_a_stop_survives_the_death_of_the_server_before_its_signal(service, tmp_path):
    service.start()
    job = service.submit(spec(), {"seconds": 30}, {})
    wait_ledger(job)
    service.close()
    JobStore(tmp_path).want(job.id, "stop", 1)  # the server wrote this, and was killed
    wait_for(lambda: JobStore(tmp_path).get(job.id).state == "stopped", "the supervisor to read the request")
    service.__init__(tmp_path)
    assert service.get(job.id).state == "stopped"


def test_an_attempt_whose_folder_was_made_last_is_started_by_the_next_server(service, tmp_path):
    job = create(JobStore(tmp_path))
    JobStore(tmp_path).begin(job.id)  # killed before the supervisor was started
    service.close()
    service.__init__(tmp_path, executors={"local": local()}, poll=0.05)
    assert service.get(job.id).state == "starting"
    service.start()
    wait_state(service, job, "succeeded")
    assert len([line for line in ledger(job) if line.startswith("started")]) == 1


def test_one_server_per_folder(service, tmp_path):
    with pytest.raises(UserError, match="another server uses this folder"):
        controller(tmp_path)


def test_the_index_may_fail_at_any_time(service, monkeypatch):
    """The request of a user succeeds when its file is written; the rows follow."""
    service.start()

    def broken(*_):
        raise DatabaseError("the disk is full")

    monkeypatch.setattr("cook.service.index.Index.put", broken)
    job = service.submit(spec(), {}, {})
    assert job.state == "queued"
    monkeypatch.undo()
    wait_for(lambda: job.id in [each.id for each in service.list()], "the row")
    wait_state(service, job, "succeeded")


def test_jobs_are_followed_while_the_index_cannot_be_written(service, monkeypatch):
    removed = service.submit(spec(), {}, {})
    first, second = (service.submit(spec(processes=4), {"seconds": 0.3}, {}) for _ in range(2))
    service.stop(removed.id)

    def broken(*_):
        raise DatabaseError("the disk is full")

    for name in ("put", "delete"):
        monkeypatch.setattr(f"cook.service.index.Index.{name}", broken)
    service.remove(removed.id)
    service.start()
    found = [wait_state(service, job, "succeeded") for job in (first, second)]
    assert [job.attempt for job in found] == [1, 1] and found[0].ended <= found[1].started, "there is room for one"
    assert [job.state for job in service.list() if job.id != removed.id] == ["succeeded"] * 2
    monkeypatch.undo()
    wait_for(lambda: [job.state for job in service._index.list()] == ["succeeded"] * 2, "the rows")


def test_subscribers_get_the_newest_state_of_each_job(service):
    told = []
    with service.subscribe() as slow, service.subscribe(lambda: told.append(now())) as other:
        service.start()
        job = service.submit(spec(), {"seconds": 0.3}, {})
        states = []
        while "succeeded" not in states:
            states += [each.state for each in other.get(20)]
        assert states[0] == "queued" and "running" in states and told
        assert [each.state for each in slow.get(0)] == ["succeeded"]
        assert slow.get(0.01) == []
    other.close()
    assert other.get(60) == [] and service._hub._open == []
    assert service.get(job.id).state == "succeeded"


def test_requests_for_many_jobs_are_counted_by_state(service):
    for _ in range(3):
        service.submit(spec(), {}, {})
    service.stop(service.list()[0].id)
    assert service.count(owner="somebody") == {"queued": 2, "stopped": 1} and service.count(owner="x") == {}
