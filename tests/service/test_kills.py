"""Kills at random moments lose no job and run none twice. `scripts/bench/service_kills.py` makes hundreds of them."""

from __future__ import annotations

from tests.service.kills import run


def test_random_kills_lose_no_job_and_double_none(tmp_path):
    result = run(tmp_path, kills=10, seed=7)
    assert (result.lost, result.doubled) == ([], []), result
    assert result.server_kills and result.supervisor_kills and result.attempts > result.jobs > 3, result
