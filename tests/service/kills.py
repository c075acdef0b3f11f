"""Random SIGKILLs of the server and of supervisors, while a client submits jobs and repeats what was not answered.

python tests/service/kills.py HOME      # the server: reads keys from standard input, prints the ids of their jobs
"""

from __future__ import annotations

import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cook.base.processes import Process
from cook.service import trees
from cook.service.jobs import ENDED, JobStore, read
from tests.service.parts import controller, ledger, spec

WORK = 0.4  # seconds that a job takes
OPEN = 3  # jobs that wait or run at a time
PAUSE = (0.05, 0.9)  # seconds between two kills


@dataclass
class Result:
    """What a series of kills did."""

    server_kills: int = 0
    supervisor_kills: int = 0
    jobs: int = 0
    attempts: int = 0
    lost: list[str] = field(default_factory=list)  # keys without a job that succeeded
    doubled: list[str] = field(default_factory=list)  # keys with two jobs, and jobs whose attempts overlapped
    seconds: float = 0.0

    def as_json(self) -> dict:
        return asdict(self)


class Server:
    """The server as a process that can be killed."""

    def __init__(self, home: Path):
        command = [sys.executable, __file__, str(home)]
        root = str(Path(__file__).resolve().parents[2])
        self._log = open(home / "server.log", "ab")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"PYTHONPATH": root},
            start_new_session=True,
        )
        self._answers = selectors.DefaultSelector()
        self._answers.register(self._process.stdout, selectors.EVENT_READ)

    def ask(self, key: str) -> None:
        """Submits, without waiting for the answer."""
        self._process.stdin.write(f"{key}\n".encode())
        self._process.stdin.flush()

    def answers(self, seconds: float) -> list[str]:
        """The keys of jobs that were answered."""
        if not self._answers.select(seconds):
            return []
        line = self._process.stdout.readline().decode()
        assert line, f"the server has ended by itself: see {self._log.name}"
        return [line.split()[0]]

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._answers.close()
        self._log.close()


def run(home: Path, kills: int, seed: int, patience: float = 120.0) -> Result:
    """Kills the server or a supervisor some times at random moments, then waits for all jobs.

    Args:
        home: An empty folder.
        kills: How many kills.
        seed: Of the random choices.
        patience: Seconds that the last jobs may take.
    """
    rng, result, store = random.Random(seed), Result(), JobStore(home)
    keys: dict[str, bool] = {}  # whether the submission was answered
    began, server = time.monotonic(), Server(home)
    try:
        next_kill, waits = time.monotonic(), True
        while result.server_kills + result.supervisor_kills < kills:
            jobs = store.all()
            if sum(job.state not in ENDED for job in jobs) + list(keys.values()).count(False) < OPEN:
                keys[f"key-{len(keys)}"] = False
                server.ask(f"key-{len(keys) - 1}")
            for key in server.answers(0.02):
                keys[key] = True
            supervisors = [process for job in jobs if (process := _supervisor(job.folder))]
            if waits and supervisors:
                waits, next_kill = False, time.monotonic() + rng.uniform(*PAUSE)
            if waits or time.monotonic() < next_kill:
                continue
            # A server needs some time to start: most kills wait until a job runs again, the others hit the start.
            waits, next_kill = rng.random() < 0.7, time.monotonic() + rng.uniform(*PAUSE)
            if supervisors and rng.random() < 0.6:
                trees.send([rng.choice(supervisors).pid], signal.SIGKILL)
                result.supervisor_kills += 1
            else:
                server.kill()
                result.server_kills += 1
                server = Server(home)
                for key, answered in keys.items():
                    if not answered:
                        server.ask(key)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not (
            all(keys.values()) and all(job.state in ENDED for job in store.all())
        ):
            for key in server.answers(0.1):
                keys[key] = True
    finally:
        server.kill()
    jobs = store.all()
    found = Counter(job.spec["idempotency_key"] for job in jobs)
    good = {job.spec["idempotency_key"] for job in jobs if job.state == "succeeded"}
    result.lost = sorted(set(keys) - good)
    result.doubled = [key for key, number in found.items() if number > 1]
    result.doubled += [job.id for job in jobs if "overlap" in ledger(job)]
    result.jobs, result.attempts = len(keys), sum(job.attempt for job in jobs)
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _supervisor(folder: Path) -> Process | None:
    """The living supervisor of a job's newest attempt."""
    attempts = sorted((folder / "attempts").iterdir(), key=lambda path: int(path.name))
    record = read(attempts[-1] / "process.json") if attempts else None
    process = Process.from_json((record or {}).get("supervisor"))
    return process if process and process.fate() == "alive" else None


def serve(home: Path) -> None:
    service = controller(home)
    service.start()
    for line in sys.stdin:
        key = line.strip()
        job = service.submit(spec(idempotency_key=key, body_hash="b", retries=10**6), {"seconds": WORK}, {})
        print(key, job.id, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
