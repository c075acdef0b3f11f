"""Event streams: nothing is missed or repeated, readers may be slow or leave, and the server can end."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from cook.report.events import EventLog
from cook.service.api import Limits
from cook.service.streams import cursor_of
from tests.service.live import serving
from tests.service.parts import wait_for
from tests.service.test_tails import write_gates


class Reader:
    """The events of a stream, one after the other."""

    def __init__(self, live, last: str | None = None, **query):
        headers = {"Last-Event-ID": last} if last else {}
        self._context = live.http.stream("GET", "/v1/events", params=query, headers=headers)
        self.response = self._context.__enter__()
        self.last = last
        self._lines = self.response.iter_lines()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._context.__exit__(None, None, None)

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        name = ""
        for line in self._lines:
            key, _, value = line.partition(": ")
            if key == "id":
                self.last = value
            elif key == "event":
                name = value
            elif key == "data":
                yield name, json.loads(value)

    def until(self, wanted: str, count: int = 1) -> list[tuple[str, dict]]:
        found = []
        for name, data in self:
            found.append((name, data))
            count -= name == wanted
            if not count:
                return found
        raise AssertionError(f"the stream has ended after {found}")


def steps(events) -> list[int]:
    """The steps of the records that a reader has, if it obeys `reset`."""
    known: list[int] = []
    for name, data in events:
        if name == "reset":
            known.clear()
        if name == "metrics":
            known += [record["step"] for record in data["records"]]
    return known


@pytest.fixture
def start():
    """Makes a job with an attempt and a stage, as its supervisor would."""
    with contextlib.ExitStack() as logs:

        def started(live, body):
            job = live.job(body)
            (job.folder / "attempts" / "1").mkdir()
            (job.folder / "attempts" / "1" / "output.log").write_text("hello\n")
            (job.folder / "run" / "out").mkdir(exist_ok=True)
            with live.controller._lock:
                live.controller._refresh(job.id)
            return job, logs.enter_context(EventLog(job.folder / "run" / "out" / "pretrain", tensorboard=False))

        yield started


def test_a_stream_begins_with_all_there_is_and_continues(live, body, start):
    job, log = start(live, body)
    for step in range(3):
        log.write({"step": step})
    write_gates(job.folder, range(3))
    with Reader(live, jobs=job.id) as reader:
        assert reader.response.headers["content-type"].startswith("text/event-stream")
        events = reader.until("ready")
        assert [name for name, _ in events] == ["job", "reset", "metrics", "gates", "log", "ready"]
        assert events[0][1]["id"] == job.id and steps(events) == [0, 1, 2]
        assert events[3][1]["step"] == 2 and events[4][1] == events[4][1] | {"text": "hello\n", "offset": 0}
        log.write({"step": 3})
        assert reader.until("metrics")[-1][1] == {"id": job.id, "stage": "pretrain", "records": [{"step": 3}]}
        with open(job.folder / "attempts" / "1" / "output.log", "a") as file:
            file.write("more\n")
        assert reader.until("log")[-1][1]["text"] == "more\n"
        live.http.post(f"/v1/jobs/{job.id}/stop")
        assert reader.until("job")[-1][1]["state"] == "stopping"


def test_a_reader_that_comes_back_misses_and_repeats_nothing(live, body, start):
    job, log = start(live, body)
    for step in range(3):
        log.write({"step": step})
    with Reader(live, jobs=job.id, logs="false") as reader:
        reader.until("ready")
        last = reader.last
    for step in range(3, 6):
        log.write({"step": step})
    with Reader(live, last, jobs=job.id, logs="false") as reader:
        events = reader.until("ready")
        assert "reset" not in [name for name, _ in events] and steps(events) == [3, 4, 5]
    with Reader(live, "nonsense", jobs=job.id) as reader:
        assert steps(reader.until("ready")) == list(range(6))


def test_a_resumed_run_resets_its_stage(live, body, start):
    job, log = start(live, body)
    for step in range(6):
        log.write({"step": step})
    with Reader(live, jobs=job.id) as reader:
        events = reader.until("ready")
        log.rewind(2)
        log.write({"step": 3})
        events += reader.until("metrics")
        assert steps(events) == [0, 1, 2, 3]


def test_all_jobs_in_one_stream(live, body):
    job = live.job(body)
    with Reader(live) as reader:
        assert job.id in [data["id"] for _, data in [next(iter(reader)) for _ in range(len(live.controller.list()))]]
        new = live.job(body)
        assert reader.until("job")[-1][1]["id"] == new.id


def test_unknown_jobs_and_too_many(live, body):
    assert live.http.get("/v1/events", params={"jobs": "aaaaaaaaaaaa"}).status_code == 404
    ids = ",".join(f"{'a' * 11}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
    assert live.http.get("/v1/events", params={"jobs": ids}).status_code == 422


@pytest.mark.parametrize("text", ["", "x", "[]", "null", "3", '{"other": {}}', "[" * 100_000])
def test_a_cursor_of_another_shape_is_empty(text):
    assert cursor_of(text, ["a"]) == {}


def test_cursors_of_clients_are_not_trusted(live, body, start):
    job, log = start(live, body)
    log.write({"step": 1})
    for cursor in ({"m pretrain": 3}, {"m pretrain": [1, 10**30, "x"]}, {"log": ["a", 1]}, {"log": [10**9, 5]}, 3):
        with Reader(live, json.dumps({job.id: cursor}), jobs=job.id) as reader:
            assert steps(reader.until("ready")) == [1]


def test_a_place_is_free_again_when_a_reader_leaves(tmp_path, inputs, body):
    with serving(tmp_path, roots=[inputs], limits=Limits(streams=2)) as live:
        job = live.job(body)
        readers = [Reader(live, jobs=job.id) for _ in range(2)]
        for reader in readers:
            reader.until("ready")
        assert live.http.get("/v1/events").status_code == 429
        for reader in readers:
            reader.__exit__()
        wait_for(lambda: live.server.service.streams.open["admin"] == 0, "free places")
        with Reader(live, jobs=job.id) as reader:
            reader.until("job")


def test_heartbeats(tmp_path, inputs, body):
    with serving(tmp_path, roots=[inputs]) as live:
        live.server.service.streams.heartbeat = 0.2
        job = live.job(body)
        with live.http.stream("GET", "/v1/events", params={"jobs": job.id}) as response:
            assert any(line == ": alive" for line in response.iter_lines())


def test_a_reader_that_takes_nothing_is_disconnected_and_costs_no_memory(tmp_path, inputs, body, start):
    with serving(tmp_path, roots=[inputs]) as live:
        streams = live.server.service.streams
        streams.send_timeout = 0.5
        job, _ = start(live, body)
        stage = job.folder / "run" / "out" / "pretrain"
        stage.mkdir()
        (stage / "log.jsonl").write_text("".join(f'{{"step": {n}, "text": "{"x" * 5000}"}}\n' for n in range(4000)))
        with socket.create_connection(("127.0.0.1", live.port)) as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"GET /v1/events?jobs={job.id} HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\n"
            slow.sendall(f"{head}Authorization: Bearer {live.token}\r\n\r\n".encode())
            wait_for(lambda: streams.open["admin"] == 1, "the stream")
            assert live.http.get("/v1/health").is_success  # others are served meanwhile
            wait_for(lambda: streams.open["admin"] == 0, "the end of the stream")


def test_the_server_ends_with_open_streams(tmp_path, inputs, body):
    with serving(tmp_path, roots=[inputs]) as live:
        job = live.job(body)
        ended = []

        def read(**query):
            with httpx.stream(
                "GET", f"{live.url}/v1/events", headers=live.bearer, params=query, timeout=20
            ) as response:
                for line in response.iter_lines():
                    if line.startswith("event: job"):
                        ended.append(False)
            ended.append(True)

        threads = [threading.Thread(target=read, kwargs=query) for query in ({"jobs": job.id}, {})]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(ended) == 2, "both streams")
        began = time.monotonic()
        live.server.should_exit = True
        for thread in threads:
            thread.join(10)
        assert ended.count(True) == 2 and time.monotonic() - began < 4
