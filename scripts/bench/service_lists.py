"""Lists of 1,000 jobs: medians of requests to a running server, with its index in SQLite and in PostgreSQL.

Nothing is left out for speed: jobs are written with fsync, both databases are used as in production, and every object
of the interface has its plan. The wanted median of a list is 200 ms at most.

.venv/bin/python scripts/bench/service_lists.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common import publish

from cook.service.jobs import JobStore
from tests.service.live import Live, serving
from tests.service.parts import spec, wait_for
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
                rows += measure(Path(folder), name, url, options.jobs, options.requests)
    publish("service_lists", {"jobs": options.jobs, "requests": options.requests}, rows, options.output)


def measure(home: Path, index: str, url: str | None, jobs: int, requests: int) -> list[dict[str, Any]]:
    store = JobStore(home)
    began = time.perf_counter()
    for number in range(jobs):
        store.create(spec(name=f"job {number}", plan=PLAN), {}, {})
    created = time.perf_counter() - began
    with serving(home, database=url) as live:
        kinds: dict[str, Callable[[], object]] = {
            f"all {jobs}": lambda: len(get(live, "/v1/jobs?limit=1000").json()["jobs"]) == jobs,
            "the newest 100": lambda: len(get(live, "/v1/jobs").json()["jobs"]) == 100,
            "100 in one state": lambda: len(get(live, "/v1/jobs?state=queued").json()["jobs"]) == 100,
            "the page": lambda: get(live, "/").text.count("<tr data-id") == 100,
        }
        wait_for(lambda: get(live, "/v1/health").is_success, "the server")
        rows = []
        for kind, request in kinds.items():
            times = [seconds(request) for _ in range(requests + 3)][3:]
            quantiles = statistics.quantiles(times, n=20)
            found = {"median_ms": 1000 * statistics.median(times), "p95_ms": 1000 * quantiles[-1]}
            rows.append({"index": index, "list": kind, **found, "created_s": round(created, 1)})
        return rows


def get(live: Live, path: str) -> Any:
    return live.http.get(path).raise_for_status()


def seconds(request: Callable[[], object]) -> float:
    began = time.perf_counter()
    assert request()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
