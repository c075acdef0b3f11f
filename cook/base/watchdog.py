"""The watchdog: ends a run in bounded time if a rank dies, freezes or gets stuck, and reports which rank and where.

A collective would wait for a lost rank until the timeout of the process group, which is hours, and would not name the
rank. Therefore a thread on every rank reports the progress of its rank through the store of the launcher's rendezvous.
This needs no further open port, and no shared folder whose caches could delay a heartbeat. Each rank watches the next
one. A rank that finds another one lost informs all ranks, and all end with `EXIT_RANK_LOST`.
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
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from cook.base.distributed import launched_rank
from cook.base.errors import EXIT_RANK_LOST, Interrupted, RankLost, RunFailed
from cook.base.processes import launchers
from cook.base.rendezvous import REMEDY, Meeting, connect

PATIENCE = {"preparing": math.inf, "starting": 10, "first step": 10, "step": 1, "saving": 10, "finishing": 10}
"""Phases of a run, and how many timeouts each may take. A rank may be silent without limit only in the first one:
tokenising a corpus may hold the interpreter lock for an hour."""

GRACE = 2.0  # seconds that a rank may take to end by itself, with its own message, after it has seen another rank end

FAREWELL = 1.0  # seconds in which an ending rank tries to report that it ends

LAST_CALL = 5.0  # seconds that a pending call to the store may take to return when the run ends

CULPRIT_SECONDS = 16.0
"""Seconds for which a rank with a failed collective looks for the rank that caused it. Launchers kill after 30."""

SILENCE = 8.0
"""Seconds of silence after which a rank is considered the cause of a failed collective, or of a SIGTERM that arrives
while this rank waits: launchers send SIGTERM to the remaining ranks. It is several times the longest interval."""

STARTING = 60.0
"""Seconds for which a rank may always be silent while it starts: imports and connections hold the interpreter lock."""

CONNECTING = 60.0
SLEPT = 10.0
"""A watchdog that wakes this many seconds late was stopped itself, for example by a suspended Slurm job or laptop."""

At = Callable[[int, str], None]  # a callback for progress: receives the step and one of the phases of PATIENCE

PACKAGE = str(Path(__file__).resolve().parents[1])
LOST_PEER = re.compile(r"gloo|nccl|c10d|connection|broken pipe|peer|socket", re.IGNORECASE)


class Watchdog:
    """A context manager that watches the other ranks. It does nothing on a single rank.

    It uses two threads. One communicates with the store, and hangs if the store hangs. The other decides whether a rank
    is lost, and uses only clocks and process states.

    Args:
        timeout: Seconds for which a rank may be silent or a step may take. 0 switches the watchdog off.
        meeting: The rendezvous of the ranks. None for a single rank.
    """

    def __init__(self, timeout: float, meeting: Meeting | None = None):
        self.timeout = timeout
        self.interval = max(0.1, min(2.0, timeout / 10))
        self.at_loss: Callable[[], None] = lambda: None
        """Called before this rank ends because another one is lost. Context managers are not exited in that case."""
        self._processes = meeting.processes if meeting else []
        self._place: dict[str, Any] = {"step": 0, "phase": "starting", "moves": 0, "ended": None}
        self._told: dict[str, Any] = self._place
        self._verdict: str | None = None
        self._moved = self._heard = self._reached = time.monotonic()
        self._news, self._farewell, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._store: dist.Store | None = None
        self._main = threading.get_ident()
        self._on = False
        self._told_to_stop: float | None = None

    def at(self, step: int, phase: str) -> None:
        """Records the progress of this rank's main thread. `phase` is one of PATIENCE."""
        assert phase in PATIENCE, phase
        changed = phase != self._place["phase"]
        self._place = {**self._place, "step": step, "phase": phase, "moves": self._place["moves"] + 1}
        self._moved = time.monotonic()
        if changed:
            self._news.set()

    def __enter__(self) -> Watchdog:
        self._rank, self._world = launched_rank(), len(self._processes)
        if self._world <= 1 or not self.timeout:
            return self
        self._launchers = launchers() or []
        self._ears, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake_before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._tell(beat=0)
        self._on = True
        work = (self._talk, self._watch)
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
        self._place = {**self._place, "ended": f"{kind.__name__}: {error}".splitlines()[0] if kind else "well"}
        self._moved = time.monotonic()
        self._news.set()
        self._farewell.wait(FAREWELL)
        # After a rank has ended, a collective, or a save that needs one, reports only a lost connection.
        if isinstance(error, RuntimeError | RunFailed) and LOST_PEER.search(str(error)):
            reason = self._culprit()
        if isinstance(reason, RankLost):
            self._pass_on(str(reason))
            self._lose()
        elif kind and self._rank == 0:
            self._linger()
        self._stop.set()
        self._news.set()
        for thread in self._threads:  # a thread inside a store call would abort the process when Python exits
            thread.join(LAST_CALL)
        os.close(signal.set_wakeup_fd(self._wake_before))
        os.close(self._ears)
        if isinstance(reason, RankLost):
            raise RankLost(f"{reason}\n{REMEDY}") from error
        if reason:
            raise reason from error

    def _reach(self) -> dist.Store:
        """The store, over a separate connection of this watchdog."""
        if self._store is None:
            self._store = connect(CONNECTING)
        return self._store

    def _tell(self, beat: int) -> None:
        self._reach().set(f"{self._rank}", json.dumps({**self._place, "beat": beat, "at": _doing(self._main)}))

    def _ask(self, rank: int) -> dict[str, Any]:
        return json.loads(self._known().get(f"{rank}"))

    def _ask_all(self) -> dict[int, dict[str, Any]]:
        told = self._known().multi_get([f"{rank}" for rank in range(self._world)])
        return {rank: json.loads(place) for rank, place in enumerate(told)}

    def _ask_verdict(self) -> str | None:
        return self._known().get("verdict").decode() if self._known().check(["verdict"]) else None

    def _known(self) -> dist.Store:
        # Connecting to a store that has ended takes a minute. Only the communication thread may wait that long.
        if self._store is None:
            raise dist.DistNetworkError("the store is not connected")
        return self._store

    def _talk(self) -> None:
        """Publishes the state of this rank and reads that of the next one, periodically."""
        beat = 0
        while not self._stop.is_set():
            beat += 1
            try:
                place = self._place
                self._tell(beat)
                if place["ended"]:
                    self._farewell.set()
                self._verdict = self._ask_verdict()
                told = self._ask((self._rank + 1) % self._world)
                self._reached = time.monotonic()
                if told != self._told:
                    self._told, self._heard = told, self._reached
            except RuntimeError:  # the store's errors are of this kind
                self._store = None
                self._stop.wait(self.interval)
            self._news.wait(self.interval)
            self._news.clear()

    def _watch(self) -> None:
        woken = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            if now - woken > 3 * self.interval + SLEPT:  # the whole machine or job was suspended: no rank is at fault
                self._heard = self._reached = self._moved = now
            woken = now
            with contextlib.suppress(BlockingIOError):  # inside a collective, the main thread handles no signal
                if {signal.SIGTERM, signal.SIGINT} & set(os.read(self._ears, 64)):
                    self._told_to_stop = now
            lost = self._verdict or self._judge(now)
            # A rank that ended by itself has reported why, and this rank is about to end for that reason.
            if lost and not self._stop.wait(GRACE):
                self._end(lost)

    def _judge(self, now: float) -> str | None:
        """Describes what is wrong with the run; None if nothing is."""
        told, next_rank = self._told, (self._rank + 1) % self._world
        silent, unreachable = now - self._heard, now - self._reached
        stopped = [rank for rank in (0, next_rank) if self._processes[rank].is_stopped()]
        patience = reach = self.timeout
        if any(launcher.fate() == "dead" for launcher in self._launchers):
            reach *= PATIENCE[self._place["phase"]]  # torchrun's store ended with it, and this rank is saving
        elif self._told_to_stop is not None and now - self._told_to_stop > SILENCE:
            patience = reach = min(self.timeout, SILENCE)
        elif "starting" in (self._place["phase"], told["phase"]):
            patience = reach = max(self.timeout, STARTING)
        lost = None
        if told["ended"] is None and self._is_dead(next_rank):
            lost = f"{self._name(next_rank)} has died, {_last_seen(told)}"
        elif unreachable > 2 * self.interval and self._is_dead(0):
            lost = f"{self._name(0)} has died"
        elif self._place["phase"] == "preparing":
            return None
        elif unreachable > reach:
            who = self._name(stopped[0]) if stopped else f"{self._name(0)}, or the process that hosts its store,"
            lost = f"{who} has been silent for {unreachable:.0f} s"
        elif told["ended"] != "well" and told["phase"] != "preparing" and silent > patience:
            lost = f"{self._name(next_rank)} has been silent for {silent:.0f} s, {told['ended'] or _last_seen(told)}"
        # Slightly later than the check for silence, whose message says more.
        elif now - self._moved > self.timeout * PATIENCE[self._place["phase"]] + 3 * self.interval:
            return self._nobody_moves(now - self._moved)
        return lost and f"{lost}; {self._own_place()}"

    def _own_place(self) -> str:
        return f"rank {self._rank} is at step {self._place['step']} ({self._place['phase']})"

    def _name(self, rank: int) -> str:
        process = self._processes[rank]
        return f"rank {rank} (process {process.pid} on {process.host})"

    def _is_dead(self, rank: int) -> bool:
        return rank != self._rank and self._processes[rank].fate() == "dead"

    def _nobody_moves(self, seconds: float) -> str | None:
        """Names the ranks that have made the least progress, and where their main threads are.

        Returns None if the store does not answer: the process that hosts it is then reported as silent.
        """
        places: dict[int, dict[str, Any]] = {}

        def ask() -> None:
            try:
                places.update(self._ask_all())
            except RuntimeError:
                places[self._rank] = {**self._place, "at": _doing(self._main)}

        asking = threading.Thread(target=ask, daemon=True)  # a call to the store of a stopped process never returns
        asking.start()
        asking.join(GRACE)
        if not places:
            return None
        least = min(place["moves"] for place in places.values())
        behind = [rank for rank, place in places.items() if place["moves"] == least]
        stand = [f"\n  rank {rank} is {_last_seen(places[rank])}, in {places[rank]['at']}" for rank in behind[:8]]
        held = f"no progress for {seconds:.0f} s; {len(behind)} of {self._world} ranks are furthest behind:"
        return held + "".join(stand)

    def _culprit(self) -> RankLost | Interrupted | None:
        """Finds why this rank's collective has failed; None if no reason is found in time."""
        begun = reached = time.monotonic()
        heard: dict[int, tuple[dict[str, Any], float]] = {}
        while (now := time.monotonic()) - begun < CULPRIT_SECONDS:
            if found := self._look(heard):
                return found
            reached = max([reached, *(last for _, last in heard.values())])
            if now - reached > SILENCE:
                return self._lost(0, "has died or cannot be reached, or the process that hosts its store has")
            for rank, (place, last) in heard.items():
                if reached - last > SILENCE:
                    return self._lost(rank, f"has died or cannot be reached, silent for {reached - last:.0f} s", place)
            time.sleep(0.2)
        return None

    def _look(self, heard: dict[int, tuple[dict[str, Any], float]]) -> RankLost | Interrupted | None:
        """Looks once for a rank that has ended. Records in `heard` each running rank's last report and its time."""
        places: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(RuntimeError):
            if verdict := self._ask_verdict():
                return RankLost(verdict)
            places = self._ask_all()
        for rank in range(self._world):
            place = places.get(rank)
            ended = place["ended"] if place else None
            if not ended and self._is_dead(rank):
                return self._lost(rank, "has died", place)
            if rank == self._rank and place:
                heard[rank] = place, time.monotonic()  # the store answers
            elif ended and ended.startswith("Interrupted"):
                return Interrupted(f"{self._name(rank)} was asked to stop; the same command resumes the run")
            elif place and ended and ended != "well" and not LOST_PEER.search(ended):
                return RankLost(f"{self._name(rank)} has failed, {_last_seen(place)}: {ended}; {self._own_place()}")
            elif place and not ended and (rank not in heard or heard[rank][0] != place):
                heard[rank] = place, time.monotonic()
            elif ended:
                heard.pop(rank, None)
        return None

    def _linger(self) -> None:
        """Waits until the other ranks know why this one ends, since the store may end with this rank."""
        deadline = time.monotonic() + 2 * self.interval + GRACE
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and not all(place["ended"] for place in self._ask_all().values()):
                time.sleep(0.1)

    def _lost(self, rank: int, how: str, place: dict[str, Any] | None = None) -> RankLost:
        seen = f", {_last_seen(place)}" if place else ""
        return RankLost(f"{self._name(rank)} {how}{seen}; {self._own_place()}")

    def _lose(self) -> None:
        """Calls `at_loss` in a thread, because its folder may be on a machine that was lost."""
        last = threading.Thread(target=self.at_loss, daemon=True)
        last.start()
        last.join(LAST_CALL)

    def _pass_on(self, verdict: str) -> None:
        """Publishes a verdict and gives the others time to read it, since the store may end with this process."""
        with contextlib.suppress(RuntimeError):
            self._known().set("verdict", verdict)
        time.sleep(max(GRACE / 2, 2 * self.interval))

    def _end(self, verdict: str) -> None:
        _say(f"failed: {verdict}\n{REMEDY}")
        for process in self._processes:
            if process.is_stopped():
                # It would keep its memory, and continue alone if it were resumed.
                with contextlib.suppress(OSError):
                    os.kill(process.pid, signal.SIGKILL)
        # The store may hang, and the main thread waits in a collective and handles no signal.
        telling = threading.Thread(target=self._pass_on, args=(verdict,), daemon=True)
        telling.start()
        telling.join(2 * self.interval + GRACE)
        self._lose()
        os._exit(EXIT_RANK_LOST)


def _last_seen(place: dict[str, Any]) -> str:
    return f"last seen at step {place['step']} ({place['phase']})"


def _doing(thread: int) -> str:
    """The innermost line of this package that a thread is executing."""
    frame: FrameType | None = sys._current_frames().get(thread)
    innermost = frame
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    frame = frame or innermost
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}" if frame else "its end"


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
