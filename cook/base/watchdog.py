"""The watchdog: ends a run in bounded time if a rank dies, freezes or gets stuck, and reports which rank and where.

A collective would wait for a lost rank until the timeout of the process group, which is hours, and would not name the
rank. Therefore a thread on every rank reports its rank's progress through the store of the launcher's rendezvous. This
needs no further open port, and no shared folder whose caches could delay a heartbeat. Each rank watches the next one. A
rank that finds another one lost notifies all ranks, and all end with `EXIT_RANK_LOST`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from cook.base.distributed import launched_rank
from cook.base.errors import EXIT_RANK_LOST, Interrupted, RankLost, RunFailed, write_to_stderr
from cook.base.processes import launchers
from cook.base.rendezvous import REMEDY, Meeting, connect

PATIENCE = {"preparing": math.inf, "starting": 10, "first step": 10, "step": 1, "saving": 10, "finishing": 10}
"""Phases of a run, and how many timeouts each may take. A rank may be silent without limit only in the first one:
tokenising a corpus may hold the interpreter lock for an hour."""

# Seconds:
GRACE = 2.0  # that a rank may take to end by itself, with its own message, after it has seen another rank end
END_REPORT = 1.0  # in which an ending rank tries to report that it ends
LAST_CALL = 5.0  # that a pending call to the store may take to return when the run ends
CAUSE = 16.0  # for which a rank with a failed collective looks for the rank that caused it. Launchers kill after 30
STARTING = 60.0  # for which a rank may always be silent while it starts: imports hold the interpreter lock
CONNECTING = 60.0  # for a new connection to the store
SLEPT = 10.0  # of delay after which a watchdog was itself stopped, such as by a suspended Slurm job or laptop
SILENCE = 8.0
"""Seconds of silence after which a rank is considered the cause of a failed collective, or of a SIGTERM that arrives
while this rank waits: launchers send SIGTERM to the remaining ranks. It is several times the longest interval."""

At = Callable[[int, str], None]  # a callback for progress: receives the step and one of the phases of PATIENCE
Report = dict[str, Any]
"""A rank's step, phase, number of moves and end (None while it runs); in the store also the heartbeat and the line."""

PACKAGE = str(Path(__file__).resolve().parents[1])
LOST_PEER = re.compile(r"gloo|nccl|c10d|connection|broken pipe|peer|socket", re.IGNORECASE)


class Watchdog:
    """A context manager that watches the other ranks. It does nothing on a single rank (`meeting` is None).

    It uses two threads. One communicates with the store, and hangs if the store hangs. The other decides whether a rank
    is lost, and uses only clocks and process states. A rank may be silent, or a step take, `timeout` seconds; 0
    switches the watchdog off.
    """

    def __init__(self, timeout: float, meeting: Meeting | None = None):
        self.timeout = timeout
        self.interval = max(0.1, min(2.0, timeout / 10))
        # Called with the verdict before this rank ends because another one is lost. Context managers are not exited in
        # that case.
        self.at_loss: Callable[[str], None] = lambda _verdict: None
        self._processes = meeting.processes if meeting else []
        self._own: Report = {"step": 0, "phase": "starting", "moves": 0, "ended": None}
        self._next = self._own  # the last report of the next rank
        self._verdict: str | None = None
        # Times of this rank's last progress, of the next rank's last new report, and of the store's last answer.
        self._moved = self._received = self._answered = time.monotonic()
        self._changed, self._end_reported, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._store: dist.Store | None = None
        self._main = threading.get_ident()
        self._on = False
        self._stop_requested: float | None = None

    def at(self, step: int, phase: str) -> None:
        """Records the progress of this rank's main thread. `phase` is one of PATIENCE."""
        assert phase in PATIENCE, phase
        changed = phase != self._own["phase"]
        self._own = {**self._own, "step": step, "phase": phase, "moves": self._own["moves"] + 1}
        self._moved = time.monotonic()
        if changed:
            self._changed.set()

    def __enter__(self) -> Watchdog:
        self._rank, self._world = launched_rank(), len(self._processes)
        if self._world <= 1 or not self.timeout:
            return self
        self._launchers = launchers() or []
        self._signal_pipe, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake_before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._report(beat=0)
        self._on = True
        work = (self._communicate, self._watch)
        self._threads = [threading.Thread(target=part, name="watchdog", daemon=True) for part in work]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._on:
            return
        # A launcher that has seen a rank die stops the others. Look for that rank before rank 0, which may host the
        # store, learns that this rank has ended.
        found = self._look({}) if isinstance(error, Interrupted) else None
        reason: RankLost | Interrupted | None = found if isinstance(found, RankLost) else None
        self._own = {**self._own, "ended": f"{kind.__name__}: {error}".splitlines()[0] if kind else "well"}
        self._moved = time.monotonic()
        self._changed.set()
        self._end_reported.wait(END_REPORT)
        # After a rank has ended, a collective, or a save that needs one, reports only a lost connection.
        if isinstance(error, RuntimeError | RunFailed) and LOST_PEER.search(str(error)):
            reason = self._find_cause()
        if isinstance(reason, RankLost):
            self._publish(str(reason))
            self._call_at_loss(str(reason))
        elif kind and self._rank == 0:
            self._await_ends()
        self._stop.set()
        self._changed.set()
        for thread in self._threads:  # a thread inside a store call would abort the process when Python exits
            thread.join(LAST_CALL)
        os.close(signal.set_wakeup_fd(self._wake_before))
        os.close(self._signal_pipe)
        if isinstance(reason, RankLost):
            raise RankLost(f"{reason}\n{REMEDY}") from error
        if reason:
            raise reason from error

    def _report(self, beat: int) -> None:
        """Writes this rank's report to the store, over a separate connection of this watchdog."""
        if self._store is None:
            self._store = connect(CONNECTING)
        self._store.set(f"{self._rank}", json.dumps({**self._own, "beat": beat, "at": _line_of(self._main)}))

    def _reports(self, ranks: Sequence[int]) -> dict[int, Report]:
        found = self._known().multi_get([f"{rank}" for rank in ranks])
        return {rank: json.loads(report) for rank, report in zip(ranks, found, strict=True)}

    def _published_verdict(self) -> str | None:
        return self._known().get("verdict").decode() if self._known().check(["verdict"]) else None

    def _known(self) -> dist.Store:
        # Connecting to a store that has ended takes a minute. Only the communication thread may wait that long.
        if self._store is None:
            raise dist.DistNetworkError("the store is not connected")
        return self._store

    def _communicate(self) -> None:
        """Writes the report of this rank and reads that of the next one, periodically."""
        beat, next_rank = 0, (self._rank + 1) % self._world
        while not self._stop.is_set():
            beat += 1
            try:
                has_ended = self._own["ended"]
                self._report(beat)
                if has_ended:
                    self._end_reported.set()
                self._verdict = self._published_verdict()
                report = self._reports([next_rank])[next_rank]
                self._answered = time.monotonic()
                if report != self._next:
                    self._next, self._received = report, self._answered
            except RuntimeError:  # the store's errors are of this kind
                self._store = None
                self._stop.wait(self.interval)
            self._changed.wait(self.interval)
            self._changed.clear()

    def _watch(self) -> None:
        woken = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            if now - woken > 3 * self.interval + SLEPT:  # the whole machine or job was suspended: no rank is at fault
                self._received = self._answered = self._moved = now
            woken = now
            with contextlib.suppress(BlockingIOError):  # inside a collective, the main thread handles no signal
                if {signal.SIGTERM, signal.SIGINT} & set(os.read(self._signal_pipe, 64)):
                    self._stop_requested = now
            lost = self._verdict or self._judge(now)
            # A rank that ended by itself has reported why, and this rank is about to end for that reason.
            if lost and not self._stop.wait(GRACE):
                self._end(lost)

    def _judge(self, now: float) -> str | None:
        """Describes what is wrong with the run; None if nothing is."""
        own, report, next_rank = self._own["phase"], self._next, (self._rank + 1) % self._world
        silent, unreachable = now - self._received, now - self._answered
        stopped = [rank for rank in (0, next_rank) if self._processes[rank].is_stopped()]
        patience = reach = self.timeout
        if any(launcher.fate() == "dead" for launcher in self._launchers):
            reach *= PATIENCE[own]  # torchrun's store ended with it, and this rank is saving
        elif self._stop_requested is not None and now - self._stop_requested > SILENCE:
            patience = reach = min(self.timeout, SILENCE)
        elif "starting" in (own, report["phase"]):
            longer = max(self.timeout, STARTING)
            patience = self.timeout if next_rank in stopped else longer  # a stopped process imports nothing
            reach = self.timeout if 0 in stopped else longer
        lost = None
        if report["ended"] is None and self._is_dead(next_rank):
            lost = f"{self._name(next_rank)} has died, {_last_seen(report)}"
        elif unreachable > 2 * self.interval and self._is_dead(0):
            lost = f"{self._name(0)} has died"
        elif own == "preparing":
            return None
        elif unreachable > reach:
            who = self._name(stopped[0]) if stopped else f"{self._name(0)}, or the process that hosts its store,"
            lost = f"{who} has been silent for {unreachable:.0f} s"
        elif report["ended"] != "well" and report["phase"] != "preparing" and silent > patience:
            seen = report["ended"] or _last_seen(report)
            lost = f"{self._name(next_rank)} has been silent for {silent:.0f} s, {seen}"
        # Slightly later than the check for silence, whose message says more.
        elif now - self._moved > self.timeout * PATIENCE[own] + 3 * self.interval:
            return self._nobody_moves(now - self._moved)
        return lost and f"{lost}; {self._own_position()}"

    def _own_position(self) -> str:
        return f"rank {self._rank} is at step {self._own['step']} ({self._own['phase']})"

    def _name(self, rank: int) -> str:
        process = self._processes[rank]
        return f"rank {rank} (process {process.pid} on {process.host})"

    def _is_dead(self, rank: int) -> bool:
        return rank != self._rank and self._processes[rank].fate() == "dead"

    def _nobody_moves(self, seconds: float) -> str | None:
        """Names the ranks that have made the least progress, and where their main threads are.

        Returns None if the store does not answer: the process that hosts it is then reported as silent.
        """
        reports: dict[int, Report] = {}

        def read() -> None:
            try:
                reports.update(self._reports(range(self._world)))
            except RuntimeError:
                reports[self._rank] = {**self._own, "at": _line_of(self._main)}

        _run_at_most(GRACE, read)  # a call to the store of a stopped process never returns
        if not reports:
            return None
        least = min(report["moves"] for report in reports.values())
        behind = [rank for rank, report in reports.items() if report["moves"] == least]
        lines = [f"\n  rank {rank} is {_last_seen(reports[rank])}, in {reports[rank]['at']}" for rank in behind[:8]]
        what = f"no progress for {seconds:.0f} s; {len(behind)} of {self._world} ranks are furthest behind:"
        return what + "".join(lines)

    def _find_cause(self) -> RankLost | Interrupted | None:
        """Finds why this rank's collective has failed; None if no reason is found in time."""
        begun = answered = time.monotonic()
        received: dict[int, tuple[Report, float]] = {}
        while (now := time.monotonic()) - begun < CAUSE:
            if found := self._look(received):
                return found
            answered = max([answered, *(last for _, last in received.values())])
            if now - answered > SILENCE:
                return self._lost(0, "has died or cannot be reached, or the process that hosts its store has")
            for rank, (report, last) in received.items():
                if answered - last > SILENCE:
                    how = f"has died or cannot be reached, silent for {answered - last:.0f} s"
                    return self._lost(rank, how, report)
            time.sleep(0.2)
        return None

    def _look(self, received: dict[int, tuple[Report, float]]) -> RankLost | Interrupted | None:
        """Looks once for a rank that has ended. Updates `received`: each running rank's last report and its time."""
        reports: dict[int, Report] = {}
        with contextlib.suppress(RuntimeError):
            if verdict := self._published_verdict():
                return RankLost(verdict)
            reports = self._reports(range(self._world))
        for rank in range(self._world):
            report = reports.get(rank)
            ended = report["ended"] if report else None
            if not ended and self._is_dead(rank):
                return self._lost(rank, "has died", report)
            if rank == self._rank and report:
                received[rank] = report, time.monotonic()  # the store answers
            elif ended and ended.startswith("Interrupted"):
                return Interrupted(f"{self._name(rank)} was asked to stop; the same command resumes the run")
            elif report and ended and ended != "well" and not LOST_PEER.search(ended):
                what = f"{self._name(rank)} has failed, {_last_seen(report)}: {ended}; {self._own_position()}"
                return RankLost(what)
            elif report and not ended and (rank not in received or received[rank][0] != report):
                received[rank] = report, time.monotonic()
            elif ended:
                received.pop(rank, None)
        return None

    def _await_ends(self) -> None:
        """Waits until the other ranks know why this one ends, since the store may end with this rank."""
        deadline = time.monotonic() + 2 * self.interval + GRACE
        with contextlib.suppress(RuntimeError):
            while any(not report["ended"] for report in self._reports(range(self._world)).values()):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.1)

    def _lost(self, rank: int, how: str, report: Report | None = None) -> RankLost:
        seen = f", {_last_seen(report)}" if report else ""
        return RankLost(f"{self._name(rank)} {how}{seen}; {self._own_position()}")

    def _call_at_loss(self, verdict: str) -> None:
        _run_at_most(LAST_CALL, lambda: self.at_loss(verdict))  # its folder may be on a machine that was lost

    def _publish(self, verdict: str) -> None:
        """Publishes a verdict and gives the others time to read it, since the store may end with this process."""
        with contextlib.suppress(RuntimeError):
            self._known().set("verdict", verdict)
        time.sleep(max(GRACE / 2, 2 * self.interval))

    def _end(self, verdict: str) -> None:
        write_to_stderr(f"failed: {verdict}\n{REMEDY}")
        for process in self._processes:
            if process.is_stopped():
                # It would keep its memory, and continue alone if it were resumed.
                with contextlib.suppress(OSError):
                    os.kill(process.pid, signal.SIGKILL)
        # The store may hang, and the main thread waits in a collective and handles no signal.
        _run_at_most(2 * self.interval + GRACE, lambda: self._publish(verdict))
        self._call_at_loss(verdict)
        os._exit(EXIT_RANK_LOST)


def _run_at_most(seconds: float, action: Callable[[], None]) -> None:
    """Runs `action` in a thread, and leaves it behind if it takes longer."""
    thread = threading.Thread(target=action, daemon=True)
    with contextlib.suppress(RuntimeError):  # no memory for a thread: the rank must end all the same
        thread.start()
        thread.join(seconds)


def _last_seen(report: Report) -> str:
    return f"last seen at step {report['step']} ({report['phase']})"


def _line_of(thread: int) -> str:
    """The innermost line of this package that a thread is executing."""
    frame: FrameType | None = sys._current_frames().get(thread)
    innermost = frame
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    frame = frame or innermost
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}" if frame else "its end"
