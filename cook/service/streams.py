"""Server-sent events: the changes of several jobs in one stream.

A stream reads files only as fast as its reader takes the events, so nothing waits in memory. The `id` of an event holds
how far every file has been sent: a reader that connects again with `Last-Event-ID` misses and repeats nothing, also
after a restart of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cook.config.types import STAGE_NAMES
from cook.service.controller import Controller
from cook.service.jobs import Job
from cook.service.tails import OUTPUT, TEXT_BYTES, Mark, open_gates, read_records, read_text

POLL = 0.5
"""Seconds between two looks at the files of a job."""
HEARTBEAT = 15.0
SEND_TIMEOUT = 60.0
"""Seconds after which a reader that takes nothing is disconnected."""
MAX_JOBS = 20
"""Jobs whose files one stream follows."""
RECENT = 100
"""Jobs that a stream of all jobs begins with."""

Cursor = dict[str, Any]
Event = tuple[str, dict[str, Any]]
Describe = Callable[[Job], dict[str, Any]]


class TooMany(Exception):
    """An owner has too many open streams."""


class Streams:
    """All open streams.

    Args:
        controller: The jobs.
        describe: Makes the job object of the API.
        limit: Open streams per owner.
        heartbeat: Seconds between two signs of life.
        send_timeout: Seconds that a reader may take for one event.
    """

    def __init__(
        self,
        controller: Controller,
        describe: Describe,
        *,
        limit: int = 32,
        heartbeat: float = HEARTBEAT,
        send_timeout: float = SEND_TIMEOUT,
    ):
        self.controller, self.describe = controller, describe
        self.limit, self.heartbeat, self.send_timeout = limit, heartbeat, send_timeout
        self.open: Counter[str] = Counter()
        self.closed = False
        self._wakes: set[asyncio.Event] = set()

    def close(self) -> None:
        """Ends all streams; called in the event loop."""
        self.closed = True
        for wake in self._wakes:
            wake.set()

    def enter(self, owner: str) -> None:
        """Takes a place of an owner; raises TooMany if there is none."""
        if self.open[owner] >= self.limit:
            raise TooMany(f"{owner} has {self.limit} open streams, which is the limit")
        self.open[owner] += 1

    def leave(self, owner: str) -> None:
        """Gives the place back."""
        self.open[owner] -= 1

    async def events(self, jobs: Sequence[str], cursor: Cursor, *, logs: bool = True) -> AsyncGenerator[bytes, None]:
        """The events of some jobs, or the state of all jobs if none is named; ends when the server stops."""
        wake, loop = asyncio.Event(), asyncio.get_running_loop()
        self._wakes.add(wake)
        subscription = self.controller.subscribe(lambda: loop.call_soon_threadsafe(wake.set))
        try:
            yield b"retry: 2000\n\n"
            followed = [Followed(job, self.controller, self.describe, cursor, logs=logs) for job in jobs]
            recent = [] if jobs else await asyncio.to_thread(self.controller.list, limit=RECENT)
            changed = [("job", self.describe(job)) for job in reversed(recent)]
            sent, caught_up = time.monotonic(), False
            while not self.closed:
                for event in changed:
                    yield encoded(event)
                more, quiet = False, not changed
                for one in followed:
                    events = await asyncio.to_thread(one.step)
                    more, quiet = more or one.more, quiet and not events
                    for number, event in enumerate(events, start=1):
                        # The cursor has passed all of them, so only the last one may name it.
                        yield encoded(event, cursor if number == len(events) else None)
                if followed and not more and not caught_up:
                    yield encoded(("ready", {}))
                    quiet = False
                caught_up = not more
                if quiet and time.monotonic() - sent > self.heartbeat:
                    yield b": alive\n\n"
                    quiet = False
                if not quiet:
                    sent = time.monotonic()
                if not more:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(wake.wait(), POLL if jobs else self.heartbeat)
                wake.clear()
                news = await asyncio.to_thread(subscription.get, 0)
                changed = [] if jobs else [("job", self.describe(job)) for job in news]
        finally:
            self._wakes.discard(wake)
            subscription.close()


class Followed:
    """One job of a stream. `step` reads what is new, and moves the cursor."""

    def __init__(self, job: str, controller: Controller, describe: Describe, cursor: Cursor, *, logs: bool):
        self._id, self._controller, self._describe, self._logs = job, controller, describe, logs
        known = cursor.get(job)
        self._cursor: Cursor = known if isinstance(known, dict) else {}
        cursor[job] = self._cursor
        self._shown: dict[str, Any] | None = None
        self._gone = False
        self.more = False

    def step(self) -> list[Event]:
        """New events of one file; `more` says whether there are further ones."""
        self.more = False
        if self._gone:
            return []
        try:
            job = self._controller.get(self._id)
        except KeyError:
            self._gone = True
            return []
        shown = self._describe(job)
        if shown != self._shown:
            self._shown, self.more = shown, True
            return [("job", shown)]
        for stage in stages_of(job):
            if events := self._metrics(job, stage) or self._gates(job, stage):
                return events
        return self._log(job) if self._logs and job.attempt else []

    def _metrics(self, job: Job, stage: str) -> list[Event]:
        key = f"m {stage}"
        found = read_records(job.folder, f"{OUTPUT}/{stage}/log.jsonl", Mark.from_json(self._cursor.get(key)))
        if not found.records and not found.reset:
            return []
        self.more = True
        self._cursor[key] = found.mark.as_json() if found.mark else None
        events: list[Event] = []
        if found.reset:
            self._cursor.pop(f"g {stage}", None)
            events.append(("reset", {"id": job.id, "stage": stage}))
        if found.records:
            events.append(("metrics", {"id": job.id, "stage": stage, "records": found.records}))
        return events

    def _gates(self, job: Job, stage: str) -> list[Event]:
        """The newest gate values: a picture shows only these, and `GET …/structure` returns earlier ones."""
        key = f"g {stage}"
        log = open_gates(job.folder, stage)
        newest = log.records(points=1) if log else []
        if not newest or newest[0]["step"] == self._cursor.get(key):
            return []
        self._cursor[key], self.more = newest[0]["step"], True
        return [("gates", {"id": job.id, "stage": stage, **newest[0]})]

    def _log(self, job: Job) -> list[Event]:
        known = self._cursor.get("log")
        attempt, offset = job.attempt, -TEXT_BYTES
        if isinstance(known, list) and [type(part) for part in known] == [int, int] and known[1] >= 0:
            attempt, offset = known
        if attempt != job.attempt:
            # The rest of an earlier attempt is complete, and comes first.
            found = read_text(job.folder, f"attempts/{attempt}/output.log", offset)
            if not found.text:
                attempt, offset = job.attempt, 0
        if attempt == job.attempt:
            found = read_text(job.folder, f"attempts/{attempt}/output.log", offset)
        if not found.text:
            return []
        self._cursor["log"], self.more = [attempt, found.next], True
        return [("log", {"id": job.id, "attempt": attempt, "offset": found.offset, "text": found.text})]


def stages_of(job: Job) -> list[str]:
    """The stages of a job, in the order of its plan."""
    rows = (job.spec.get("plan") or {}).get("stages") or []
    return [row["stage"] for row in rows if row.get("stage") in STAGE_NAMES] or list(STAGE_NAMES)


def encoded(event: Event, cursor: Cursor | None = None) -> bytes:
    """An event as text; with a cursor, also the `id` from which a reader can continue."""
    name, data = event
    mark = f"id: {json.dumps(cursor, separators=(',', ':'))}\n" if cursor is not None else ""
    return f"{mark}event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def cursor_of(text: str | None, jobs: Sequence[str]) -> Cursor:
    """The cursor in a `Last-Event-ID`; empty if it is none. Only the named jobs are kept."""
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError):
        return {}
    return {job: value[job] for job in jobs if job in value} if isinstance(value, dict) else {}


class EventResponse(Response):
    """A response that ends when its reader leaves, takes too long for an event, or the server stops.

    Args:
        streams: All open streams. The caller has entered `owner`, who leaves at the end.
        owner: Who reads.
        events: The encoded events.
    """

    media_type = "text/event-stream"

    def __init__(self, streams: Streams, owner: str, events: AsyncGenerator[bytes, None]):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._streams, self._owner, self._events = streams, owner, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(self._wait_until_gone(receive))
        sending = asyncio.create_task(self._send(send))
        try:
            await asyncio.wait((gone, sending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (gone, sending):
                task.cancel()
            await asyncio.gather(gone, sending, return_exceptions=True)
            self._streams.leave(self._owner)
        if not sending.cancelled() and (error := sending.exception()) is not None:
            raise error

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self._events:
                body = {"type": "http.response.body", "body": chunk, "more_body": True}
                await asyncio.wait_for(send(body), self._streams.send_timeout)
        except TimeoutError:
            return  # an incomplete response closes the connection
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def _wait_until_gone(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
