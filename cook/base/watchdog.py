"""Ends a run in bounded time when one of its ranks has died, frozen or got stuck, and says which one, and where.

A collective waits for a lost rank as long as the process group's timeout, hours here, and then does not name it. So a
thread on every rank tells the others how far its rank has come, through the store that the launcher's rendezvous keeps
anyway (nothing more listens, and no shared folder's caches can lie about a heartbeat). Each rank watches the next one;
whoever finds a rank lost tells all, and all end with `EXIT_RANK_LOST`.
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
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from cook.base import distributed
from cook.base.errors import EXIT_RANK_LOST, RankLost, RunFailed
from cook.base.processes import launchers, this_process

PATIENCE = {"preparing": math.inf, "starting": 10, "first step": 10, "step": 1, "saving": 10, "finishing": 10}
"""Phases of a run, and how many timeouts each may take. A watchdog's thread is heard through all of them but the first:
tokenising a corpus may hold the interpreter for an hour."""

GRACE = 2.0
"""Seconds in which a rank that has seen another one end may still end by itself, with its own message."""

FAREWELL = 1.0
"""Seconds in which a rank that ends tries to say so."""

LAST_CALL = 5.0
"""Seconds in which a call to the store that is under way at the end may come back."""

CULPRIT_SECONDS = 10.0
"""How long a rank whose collective has failed looks for the rank that is to blame; launchers kill after 30."""

CONNECTING = timedelta(minutes=1)
SLEPT = 10.0
"""A watchdog that wakes this much too late was itself stopped, as by Slurm's suspension of a job or a laptop's lid."""

At = Callable[[int, str], None]
"""Told how far a run has come: the step, and one of the phases of PATIENCE."""

PACKAGE = str(Path(__file__).resolve().parents[1])
LOST_PEER = re.compile(r"gloo|nccl|c10d|connection|broken pipe|peer|socket", re.IGNORECASE)
REMEDY = "  remedy: start again, the same command goes on from the last checkpoint"


class Watchdog:
    """Watches the other ranks while it is entered; does nothing on a single rank.

    Two threads: one talks to the store, and hangs if the store does; the other judges by clocks and processes alone.

    Args:
        timeout: Seconds that a rank may be silent, or a step may take; 0 switches the watch off.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.interval = max(0.1, min(5.0, timeout / 10))
        self._place: dict[str, Any] = {"step": 0, "phase": "preparing", "moves": 0, "ended": None}
        self._told: dict[str, Any] = self._place
        self._verdict: str | None = None
        self._moved = self._heard = self._reached = time.monotonic()
        self._news, self._farewell, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._store: dist.Store | None = None
        self._main = threading.get_ident()
        self._on = False

    def at(self, step: int, phase: str) -> None:
        """Notes how far this rank's main thread has come; `phase` is one of PATIENCE."""
        assert phase in PATIENCE, phase
        changed = phase != self._place["phase"]
        self._place = {**self._place, "step": step, "phase": phase, "moves": self._place["moves"] + 1}
        self._moved = time.monotonic()
        if changed:
            self._news.set()

    def __enter__(self) -> Watchdog:
        self._rank, self._world = distributed.rank(), distributed.world_size()
        if self._world == 1 or not self.timeout:
            return self
        # A launcher's restart meets the store of the start before.
        self._prefix = distributed.broadcast(uuid.uuid4().hex)
        self._processes = distributed.gather(this_process())
        self._launchers = launchers()
        self._tell(beat=0)
        distributed.barrier()  # now every rank has told
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
        self._place = {**self._place, "ended": f"{kind.__name__}: {error}".splitlines()[0] if kind else "well"}
        self._moved = time.monotonic()
        culprit = None
        self._news.set()
        self._farewell.wait(FAREWELL)
        # A lost connection is all that a collective, or a save that needs one, can say of a rank that has gone.
        if isinstance(error, RuntimeError | RunFailed) and LOST_PEER.search(str(error)):
            culprit = self._culprit()
            self._pass_on(culprit)
        self._stop.set()
        self._news.set()
        for thread in self._threads:  # one that is inside the store when Python ends would abort the process
            thread.join(LAST_CALL)
        if culprit:
            raise RankLost(f"{culprit}\n{REMEDY}") from error

    def _reach(self) -> dist.Store:
        """The store, by a connection of this object's own."""
        if self._store is None:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=CONNECTING)
            self._store = dist.PrefixStore(f"cook/{self._prefix}", store)
        return self._store

    def _tell(self, beat: int) -> None:
        self._reach().set(f"{self._rank}", json.dumps({**self._place, "beat": beat, "at": _doing(self._main)}))

    def _ask(self, rank: int) -> dict[str, Any]:
        return json.loads(self._known().get(f"{rank}"))

    def _ask_verdict(self) -> str | None:
        return self._known().get("verdict").decode() if self._known().check(["verdict"]) else None

    def _known(self) -> dist.Store:
        # To connect to a store that has ended takes a minute; only the thread that talks may wait for that.
        if self._store is None:
            raise dist.DistNetworkError("the store is not connected")
        return self._store

    def _talk(self) -> None:
        """Tells of this rank and hears of the next one, again and again."""
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
            if now - woken > 3 * self.interval + SLEPT:  # the whole machine or job was stopped: nobody is to blame
                self._heard = self._reached = self._moved = now
            woken = now
            self._heed_launcher()
            lost = self._verdict or self._judge(now)
            # What has ended by itself has said why, and this rank is about to hear of it in its own way.
            if lost and not self._stop.wait(GRACE):
                self._end(lost)

    def _judge(self, now: float) -> str | None:
        """What is wrong with the run, if anything is."""
        told, next_rank = self._told, (self._rank + 1) % self._world
        silent, unreachable = now - self._heard, now - self._reached
        stopped = [rank for rank in (0, next_rank) if self._processes[rank].is_stopped()]
        lost = None
        if told["ended"] is None and self._is_dead(next_rank):
            lost = f"{self._name(next_rank)} has died, {_last_seen(told)}"
        elif unreachable > 2 * self.interval and self._is_dead(0):
            lost = f"{self._name(0)} has died"
        elif self._place["phase"] == "preparing":
            return None
        elif unreachable > self.timeout and (stopped or self._store is None):
            who = self._name(stopped[0]) if stopped else f"{self._name(0)}, or what keeps the store for it,"
            lost = f"{who} has been silent for {unreachable:.0f} s"
        elif told["ended"] != "well" and told["phase"] != "preparing" and silent > self.timeout:
            lost = f"{self._name(next_rank)} has been silent for {silent:.0f} s, {told['ended'] or _last_seen(told)}"
        elif now - self._moved > self.timeout * PATIENCE[self._place["phase"]]:
            return self._nobody_moves(now - self._moved)
        return lost and f"{lost}; {self._own_place()}"

    def _own_place(self) -> str:
        return f"rank {self._rank} is at step {self._place['step']} ({self._place['phase']})"

    def _name(self, rank: int) -> str:
        process = self._processes[rank]
        return f"rank {rank} (process {process.pid} on {process.host})"

    def _is_dead(self, rank: int) -> bool:
        return rank != self._rank and self._processes[rank].fate() == "dead"

    def _nobody_moves(self, seconds: float) -> str:
        """Who holds up the others: those that have come least far, and where their main threads are."""
        try:
            places = {rank: self._ask(rank) for rank in range(self._world)}
        except RuntimeError:
            places = {self._rank: {**self._place, "at": _doing(self._main)}}
        least = min(place["moves"] for place in places.values())
        behind = [rank for rank, place in places.items() if place["moves"] == least]
        stand = [f"\n  rank {rank} is {_last_seen(places[rank])}, in {places[rank]['at']}" for rank in behind[:8]]
        held = f"nothing has moved for {seconds:.0f} s; {len(behind)} of {self._world} ranks have come least far:"
        return held + "".join(stand)

    def _culprit(self) -> str | None:
        """The rank that this rank's failed collective waited for, if one is found in time."""
        others = [rank for rank in range(self._world) if rank != self._rank]
        deadline = time.monotonic() + CULPRIT_SECONDS
        told: dict[int, dict[str, Any]] = {}
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):
                found = self._ask_verdict()
                if found:
                    return found
                told |= {rank: self._ask(rank) for rank in others}
            for rank in others:
                seen = f", {_last_seen(told[rank])}" if rank in told else ""
                ended = told[rank]["ended"] if rank in told else None
                if ended and ended != "well" and not LOST_PEER.search(ended):
                    return f"{self._name(rank)} has failed{seen}: {ended}; {self._own_place()}"
                if not ended and self._is_dead(rank):
                    return f"{self._name(rank)} has died{seen}; {self._own_place()}"
            time.sleep(0.2)
        return None

    def _heed_launcher(self) -> None:
        if any(launcher.fate() == "dead" for launcher in self._launchers):
            self._launchers = []
            _say("the launcher has gone: stopping as if it had sent SIGTERM")
            os.kill(os.getpid(), signal.SIGTERM)

    def _pass_on(self, verdict: str | None) -> None:
        """Lets the others read a verdict; the store may end with this process."""
        if verdict:
            with contextlib.suppress(RuntimeError):
                self._known().set("verdict", verdict)
            time.sleep(max(GRACE / 2, 2 * self.interval))

    def _end(self, verdict: str) -> None:
        _say(f"failed: {verdict}\n{REMEDY}")
        for process in self._processes:
            if process.is_stopped():
                # It would hold its memory, and go on alone if it were woken.
                with contextlib.suppress(OSError):
                    os.kill(process.pid, signal.SIGKILL)
        # The store may be what hangs, and the main thread waits in a collective and hears nothing.
        telling = threading.Thread(target=self._pass_on, args=(verdict,), daemon=True)
        telling.start()
        telling.join(2 * self.interval + GRACE)
        os._exit(EXIT_RANK_LOST)


def _last_seen(place: dict[str, Any]) -> str:
    return f"last seen at step {place['step']} ({place['phase']})"


def _doing(thread: int) -> str:
    """The innermost line of this package that a thread is in."""
    frame: FrameType | None = sys._current_frames().get(thread)
    innermost = frame
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    frame = frame or innermost
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}" if frame else "its end"


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
