"""Worker processes: results in order, and none of them outlives its parent."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cook.base.pool import in_order, num_cores

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(workers):
    results = in_order(operator.mul, ((n, n) for n in range(20)), workers, operator.abs, (1,))
    assert list(results) == [n * n for n in range(20)]
    assert num_cores() >= 1


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_here(workers):
    with pytest.raises(ZeroDivisionError):
        list(in_order(operator.truediv, [(1, 1), (1, 0), (1, 2)], workers))


def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "worker.py").write_text(
        "import os, time\ndef work(path):\n    open(path, 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    )
    (tmp_path / "parent.py").write_text(
        "import sys\nfrom worker import work\nfrom cook.base.pool import in_order\n"
        "if __name__ == '__main__':\n    list(in_order(work, [(p,) for p in sys.argv[1:]], 2))\n"
    )
    pids = [tmp_path / "a", tmp_path / "b"]
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), *map(str, pids)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [int(path.read_text()) for path in pids]
    parent.kill()
    parent.wait()
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in workers)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False
