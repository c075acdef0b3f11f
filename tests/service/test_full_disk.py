"""The disk of a home folder is full: the server keeps running, the run fails with the reason and can be resumed."""

from __future__ import annotations

import os

import pytest

from cook.service.api import Limits
from tests.service.live import serving
from tests.service.parts import fill, local, spec, wait_for, wait_ledger, wait_state


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_the_reason_and_not_the_server(small_disk, inputs, body):
    with serving(small_disk / "home", roots=[inputs], executor=local(), limits=Limits(free_bytes=1 << 20)) as live:
        old = live.controller.submit(spec(), {}, {})
        wait_state(live.controller, old, "succeeded")
        job = live.controller.submit(spec(name="long", retries=3), {"seconds": 1.0}, {})
        wait_ledger(job)
        fill(small_disk / "filler")
        for limits in (live.server.service.limits, Limits(free_bytes=0)):
            live.server.service.limits = limits
            refused = live.submit(body, **{"Idempotency-Key": "one"})
            assert refused.status_code == 507 and "cook gc" in refused.json()["error"]
        failed = wait_state(live.controller, job, "failed")
        assert "the disk is full" in failed.message and failed.attempt == 1
        assert live.http.delete(f"/v1/jobs/{old.id}").status_code == 204
        fill(small_disk / "filler")
        (shown,) = live.http.get("/v1/jobs").json()["jobs"]
        assert (shown["state"], shown["message"]) == ("failed", failed.message)
        assert "the disk is full" in live.http.get("/").text
        assert live.http.post(f"/v1/jobs/{job.id}/resume").status_code == 507
        os.unlink(small_disk / "filler")
        assert live.http.post(f"/v1/jobs/{job.id}/resume").json()["state"] == "queued"
        assert wait_state(live.controller, job, "succeeded").attempt == 2
        assert live.submit(body, **{"Idempotency-Key": "one"}).status_code == 201
        wait_for(lambda: not live.controller._stale, "the index")
    assert not list((small_disk / "home").glob("*.unusable-*"))
