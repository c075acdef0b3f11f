"""Changes of jobs for readers such as event streams."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cook.service.jobs import Job


class Subscription:
    """Changes of jobs for one reader. Only the newest state of each job waits, so a slow reader costs little memory.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, hub: Hub, notify: Callable[[], object] | None = None):
        self._hub, self._notify = hub, notify
        self._changed = threading.Condition()
        self._waiting: dict[str, Job] = {}
        self._closed = False

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, timeout: float | None = None) -> list[Job]:
        """Waits for changes and returns the changed jobs; empty after the timeout, or when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout)
            jobs, self._waiting = list(self._waiting.values()), {}
            return jobs

    def close(self) -> None:
        self._hub.remove(self)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def add(self, job: Job) -> None:
        """Called by the hub."""
        with self._changed:
            self._waiting.pop(job.id, None)
            self._waiting[job.id] = job
            self._changed.notify_all()
        if self._notify is not None:
            self._notify()


class Hub:
    """All subscriptions of a controller."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Subscription] = []

    def subscribe(self, notify: Callable[[], object] | None = None) -> Subscription:
        """Opens a subscription; `notify` is called from another thread when a change waits. It must not raise."""
        subscription = Subscription(self, notify)
        with self._lock:
            self._open.append(subscription)
        return subscription

    def remove(self, subscription: Subscription) -> None:
        with self._lock:
            if subscription in self._open:
                self._open.remove(subscription)

    def publish(self, job: Job) -> None:
        with self._lock:
            listeners = list(self._open)
        for each in listeners:
            each.add(job)

    def close(self) -> None:
        """Closes all subscriptions."""
        with self._lock:
            listeners, self._open = self._open, []
        for each in listeners:
            each.close()
