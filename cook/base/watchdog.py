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
"""Phases of a run, and how many timeouts each may take. A watchdog's thread is heard through all of them but the first:
tokenising a corpus may hold the interpreter for an hour."""

GRACE = 2.0
"""Seconds in which a rank that has seen another one end may still end by itself, with its own message."""

FAREWELL = 1.0
"""Seconds in which a rank that ends tries to say so."""

LAST_CALL = 5.0
"""Seconds in which a call to the store that is under way at the end may come back."""

CULPRIT_SECONDS = 16.0
"""How long a rank whose collective has failed looks for the rank that is to blame; launchers kill after 30."""

SILENCE = 8.0
"""Seconds without a word after which a rank is to blame for a collective that has failed, or for a SIGTERM that finds
this rank waiting: launchers send it to the ranks that are left. Several times the longest interval."""

STARTING = 60.0
"""Seconds that a rank may be silent at least while it starts: imports and connections hold the interpreter."""

CONNECTING = 60.0
SLEPT = 10.0
"""A watchdog that wakes this much too late was itself stopped, as by Slurm's suspension of a job or a laptop's lid."""

At = Callable[[int, str], None]
"""Told how far a run has come: the step, and one of the phases of PATIENCE."""

PACKAGE = str(Path(__file__).resolve().parents[1])
LOST_PEER = re.compile(r"gloo|nccl|c10d|connection|broken pipe|peer|socket", re.IGNORECASE)


class Watchdog:
    """Watches the other ranks while it is entered; does nothing on a single rank.

    Two threads: one talks to the store, and hangs if the store does; the other judges by clocks and processes alone.

    Args:
        timeout: Seconds that a rank may be silent, or a step may take; 0 switches the watch off.
        meeting: Of the ranks; None for a single one.
    """

    def __init__(self, timeout: float, meeting: Meeting | None = None):
        self.timeout = timeout
        self.interval = max(0.1, min(2.0, timeout / 10))
        self.at_loss: Callable[[], None] = lambda: None
        """Called before this rank ends because another one is lost; no context is left then."""
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
        """Notes how far this rank's main thread has come; `phase` is one of PATIENCE."""
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
        # A launcher that has seen a rank die stops the others. Looked for before the first rank, which may keep the
        # store, hears that this one has ended.
        found = self._look({}) if isinstance(error, Interrupted) else None
        reason: RankLost | Interrupted | None = found if isinstance(found, RankLost) else None
        self._place = {**self._place, "ended": f"{kind.__name__}: {error}".splitlines()[0] if kind else "well"}
        self._moved = time.monotonic()
        self._news.set()
        self._farewell.wait(FAREWELL)
        # A lost connection is all that a collective, or a save that needs one, can say of a rank that has gone.
        if isinstance(error, RuntimeError | RunFailed) and LOST_PEER.search(str(error)):
            reason = self._culprit()
        if isinstance(reason, RankLost):
            self._pass_on(str(reason))
            self._lose()
        elif kind and self._rank == 0:
            self._linger()
        self._stop.set()
        self._news.set()
        for thread in self._threads:  # one that is inside the store when Python ends would abort the process
            thread.join(LAST_CALL)
        os.close(signal.set_wakeup_fd(self._wake_before))
        os.close(self._ears)
        if isinstance(reason, RankLost):
            raise RankLost(f"{reason}\n{REMEDY}") from error
        if reason:
            raise reason from error

    def _reach(self) -> dist.Store:
        """The store, by a connection of this object's own."""
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
            with contextlib.suppress(BlockingIOError):  # the main thread, inside a collective, hears no signal
                if {signal.SIGTERM, signal.SIGINT} & set(os.read(self._ears, 64)):
                    self._told_to_stop = now
            lost = self._verdict or self._judge(now)
            # What has ended by itself has said why, and this rank is about to hear of it in its own way.
            if lost and not self._stop.wait(GRACE):
                self._end(lost)

    def _judge(self, now: float) -> str | None:
        """What is wrong with the run, if anything is."""
        told, next_rank = self._told, (self._rank + 1) % self._world
        silent, unreachable = now - self._heard, now - self._reached
        stopped = [rank for rank in (0, next_rank) if self._processes[rank].is_stopped()]
        patience = reach = self.timeout
        if any(launcher.fate() == "dead" for launcher in self._launchers):
            reach *= PATIENCE[self._place["phase"]]  # torchrun's store has gone with it, and this rank is saving
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
            who = self._name(stopped[0]) if stopped else f"{self._name(0)}, or what keeps the store for it,"
            lost = f"{who} has been silent for {unreachable:.0f} s"
        elif told["ended"] != "well" and told["phase"] != "preparing" and silent > patience:
            lost = f"{self._name(next_rank)} has been silent for {silent:.0f} s, {told['ended'] or _last_seen(told)}"
        # A little later than silence, which says more.
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

    def _nobody_moves(self, seconds: float) -> str:
        """Who holds up the others: those that have come least far, and where their main threads are."""
        try:
            places = self._ask_all()
        except RuntimeError:
            places = {self._rank: {**self._place, "at": _doing(self._main)}}
        least = min(place["moves"] for place in places.values())
        behind = [rank for rank, place in places.items() if place["moves"] == least]
        stand = [f"\n  rank {rank} is {_last_seen(places[rank])}, in {places[rank]['at']}" for rank in behind[:8]]
        held = f"nothing has moved for {seconds:.0f} s; {len(behind)} of {self._world} ranks have come least far:"
        return held + "".join(stand)

    def _culprit(self) -> RankLost | Interrupted | None:
        """Why this rank's collective has failed, if that is found in time."""
        begun = reached = time.monotonic()
        heard: dict[int, tuple[dict[str, Any], float]] = {}
        while (now := time.monotonic()) - begun < CULPRIT_SECONDS:
            if found := self._look(heard):
                return found
            reached = max([reached, *(last for _, last in heard.values())])
            if now - reached > SILENCE:
                return self._lost(0, "has died or is out of reach, or what keeps the store for it")
            for rank, (place, last) in heard.items():
                if reached - last > SILENCE:
                    return self._lost(rank, f"has died or is out of reach, silent for {reached - last:.0f} s", place)
            time.sleep(0.2)
        return None

    def _look(self, heard: dict[int, tuple[dict[str, Any], float]]) -> RankLost | Interrupted | None:
        """Looks once for a rank that has ended; `heard` takes what each rank at work has told, and when it was new."""
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
                return Interrupted(f"{self._name(rank)} was told to stop; the same command goes on")
            elif place and ended and ended != "well" and not LOST_PEER.search(ended):
                return RankLost(f"{self._name(rank)} has failed, {_last_seen(place)}: {ended}; {self._own_place()}")
            elif place and not ended and (rank not in heard or heard[rank][0] != place):
                heard[rank] = place, time.monotonic()
            elif ended:
                heard.pop(rank, None)
        return None

    def _linger(self) -> None:
        """The store may end with this rank: the others must hear first why it ends."""
        deadline = time.monotonic() + 2 * self.interval + GRACE
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and not all(place["ended"] for place in self._ask_all().values()):
                time.sleep(0.1)

    def _lost(self, rank: int, how: str, place: dict[str, Any] | None = None) -> RankLost:
        seen = f", {_last_seen(place)}" if place else ""
        return RankLost(f"{self._name(rank)} {how}{seen}; {self._own_place()}")

    def _lose(self) -> None:
        """Calls `at_loss`, whose folder may hang with what was lost."""
        last = threading.Thread(target=self.at_loss, daemon=True)
        last.start()
        last.join(LAST_CALL)

    def _pass_on(self, verdict: str) -> None:
        """Lets the others read a verdict; the store may end with this process."""
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
        self._lose()
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
