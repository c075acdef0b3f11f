"""Lists of 1,000 jobs: medians of requests to a running server, with its index in SQLite and in PostgreSQL.

Nothing is left out for speed: jobs are written with fsync, both databases are used as in production, and every object
of the interface has its plan. The wanted median of a list is 200 ms at most. The processor time of
the server (`server_cpu_ms`, the mean of a request) tells how far other programs of the machine have changed that.

.venv/bin/python scripts/bench/service_lists.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
from common import publish

from cook.service.jobs import JobStore
from tests.service.live import served
from tests.service.parts import spec
from tests.service.postgres import postgres

ROW = {
    "stage": "joint_mask",
    "weights_from": "pretrain",
    "learns": ["heads", "dims"],
    "uneven": False,
    "steps": 10_000,
    "tokens_at_most": 655_360_000,
    "parameters_before": 362_821_120,
    "parameters_after": 253_974_784,
    "state_bytes_per_rank": 5_805_137_920,
}
PLAN = {"config": "bmcook.json", "output": "out", "data": "text (docs)", "ranks": 1, "stages": [ROW] * 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=40, help="Requests of each kind.")
    parser.add_argument("--output", help="Default: results/bench/service_lists.json.")
    options = parser.parse_args()
    rows = []
    for name in ("SQLite", "PostgreSQL"):
        with tempfile.TemporaryDirectory(prefix="cook-lists-", dir=Path.home()) as folder:
            with postgres() if name == "PostgreSQL" else nullcontext() as url:
                if name == "PostgreSQL" and url is None:
                    print("PostgreSQL is not installed: left out")
                    continue
                rows += measure(Path(folder, "home"), name, url, options.jobs, options.requests)
    settings = {"jobs": options.jobs, "requests": options.requests, "load_average": os.getloadavg()[0]}
    publish("service_lists", settings, rows, options.output)


def measure(home: Path, index: str, url: str | None, jobs: int, requests: int) -> list[dict[str, Any]]:
    store = JobStore(home)
    began = time.perf_counter()
    for number in range(jobs):
        store.create(spec(name=f"job {number}", plan=PLAN, gpus=1), {}, {})  # the server has no GPU: they wait
    created = time.perf_counter() - began
    with served(home, *(["--database", url] if url else [])) as (server, client):
        process, rows = psutil.Process(server.pid), []

        def get(path: str) -> Any:
            return client._http.get(path).raise_for_status()

        kinds: dict[str, Callable[[], bool]] = {
            f"all {jobs}": lambda: len(get("/v1/jobs?limit=1000").json()["jobs"]) == jobs,
            "the newest 100": lambda: len(get("/v1/jobs").json()["jobs"]) == 100,
            "100 in one state": lambda: len(get("/v1/jobs?state=queued").json()["jobs"]) == 100,
            "the page": lambda: get("/").text.count("<tr data-id") == 100,
        }
        for kind, request in kinds.items():
            assert request() and request()
            used, times = sum(process.cpu_times()[:2]), []
            for _ in range(requests):
                began = time.perf_counter()
                assert request()
                times.append(1000 * (time.perf_counter() - began))
            used = 1000 * (sum(process.cpu_times()[:2]) - used) / requests
            found = {"median_ms": statistics.median(times), "p95_ms": statistics.quantiles(times, n=20)[-1]}
            rows.append({"index": index, "list": kind, **found, "server_cpu_ms": used, "created_s": round(created, 1)})
        return rows


if __name__ == "__main__":
    main()
