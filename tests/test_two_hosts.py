"""One run on two hosts by the real torchrun: a rank, a host or the link is lost; the same command resumes.

Both have Debian's /etc/hosts, where a machine's own name is 127.0.1.1.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cook.base.errors import EXIT_RANK_LOST
from cook.base.rendezvous import LATE
from tests.lossy_link import TUN
from tests.recipe.tiny_run import last_step, read_log, write_run
from tests.two_hosts import (
    ADDRESSES,
    REPOSITORY,
    Host,
    TwoHosts,
    cut_in_save,
    deepspeed,
    missing,
    missing_ssh,
    start_ssh,
    torchrun,
    until,
)
from tests.warm import interpreter

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
STEPS, BOUND = 150, 45.0


def kill_rank(hosts: list[Host]) -> None:
    os.kill(hosts[1].ranks()[0], signal.SIGKILL)


def kill_first(hosts: list[Host]) -> None:
    os.kill(hosts[0].ranks()[0], signal.SIGKILL)


def cut(hosts: list[Host]) -> None:
    hosts[1].cut()


FAULTS: dict[Callable[[list[Host]], None], tuple[int, ...]] = {
    kill_rank: (0,),
    kill_first: (1,),
    cut: (0, 1),
    cut_in_save: (0, 1),
}
"""What happens, and the hosts whose ranks must tell of it."""


def test_whatever_is_lost_is_named_and_the_same_command_resumes(tmp_path):
    run = tmp_path / "run"
    write_run(
        run,
        ("pretrain",),
        training__steps=STEPS,
        training__save_every=10,
        training__rank_timeout=6.0,
        training__eval_rows=0,
    )
    with TwoHosts(tmp_path / "hosts") as hosts:
        for number, (fault, tellers) in enumerate(FAULTS.items(), start=1):
            programs = start(hosts, run)
            wanted = 30 * number
            assert until(lambda w=wanted: last_step(run, "pretrain") >= w, 90), [p.printed()[-3000:] for p in programs]
            fault(hosts)
            for teller in tellers:
                assert until(lambda h=hosts[teller]: not h.ranks(), BOUND), f"{fault.__name__}: it waits for ever"
                printed = programs[teller].printed()
                lost = 1 - teller
                named = re.search(rf"failed: rank {lost} .* on host-{'ab'[lost]}.*step \d+", printed)
                assert named, f"{fault.__name__}\n{printed[-6000:]}"
                if programs[teller].process.poll() is not None and "Root Cause" in printed:
                    assert "exitcode  : 76" in printed, printed[-3000:]
            # torchrun itself may wait for the other host for a quarter of an hour.
            for host in hosts:
                host.power_off()
                host.mend()
        programs = start(hosts, run)
        codes = [program.ended(90) for program in programs]
        assert codes == [0, 0], [p.printed()[-3000:] for p in programs]
        assert re.search(r"resuming from step \d+", programs[0].printed())
    assert [r["step"] for r in read_log(run, "pretrain") if "loss" in r] == list(range(1, STEPS + 1))
    assert (run / "out" / "pretrain" / "done.json").exists() and not (run / "out" / "run.lock").exists()


MEET = """
import sys
from cook.base.errors import run_entry
from cook.base.rendezvous import meet
print("here", flush=True)
run_entry(lambda: meet(6.0) and None)
"""


def test_a_cable_that_is_cut_during_the_rendezvous_ends_the_ranks_in_bounded_time(tmp_path):
    """A third rank never comes, so that the other two wait for it when the cable is cut."""
    with TwoHosts(tmp_path / "hosts") as hosts:
        world = {"WORLD_SIZE": "3", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511", "PYTHONPATH": str(REPOSITORY)}
        ranks = [
            host.start([sys.executable, "-c", MEET], tmp_path, RANK=str(n), **world) for n, host in enumerate(hosts)
        ]
        assert until(lambda: all("here" in rank.printed() for rank in ranks), 60)
        time.sleep(1.5)  # to connect
        hosts[1].cut()
        codes = [rank.ended(6 + LATE + 10) for rank in ranks]
        printed = [rank.printed() for rank in ranks]
        assert codes == [EXIT_RANK_LOST, EXIT_RANK_LOST], printed
        assert re.search(r"only [12] of 3 ranks have connected within 6 s; missing: rank", printed[0])
        assert "10.77.0.1:29511 has not answered for 6 s" in printed[1] and "run the same command again" in printed[1]


@pytest.mark.skipif(not Path(TUN).exists(), reason=f"there is no {TUN}")
def test_a_slow_and_lossy_link_that_fails_for_two_seconds_and_clocks_that_differ_lose_nothing(tmp_path):
    """2% of the packets are lost, and the others take 20 ms, at 4 Mbit/s. The clocks since boot are a day apart.

    The wall clock cannot be set for one namespace alone.
    """
    run = tmp_path / "run"
    settings = {"training__steps": 20, "training__save_every": 10, "training__rank_timeout": 6.0}
    write_run(run, ("pretrain",), **settings, training__eval_rows=0)
    both = TwoHosts(tmp_path / "hosts", is_lossy=True)
    with both as hosts:
        programs = start(hosts, run, ahead=86_400)
        assert until(lambda: last_step(run, "pretrain") >= 4, 120), [p.printed()[-3000:] for p in programs]
        hosts[1].cut()
        time.sleep(2)
        hosts[1].mend()
        codes = [program.ended(120) for program in programs]
        assert codes == [0, 0], [p.printed()[-3000:] for p in programs]
        assert both.link is not None and both.link.lost > 0.01 * both.link.carried > 1
    assert [r["step"] for r in read_log(run, "pretrain") if "loss" in r] == list(range(1, 21))


@pytest.mark.skipif(missing_ssh() is not None, reason=str(missing_ssh()))
def test_deepspeed_over_ssh_trains_on_two_hosts_and_resumes_after_a_lost_rank(tmp_path):
    run = tmp_path / "run"
    write_run(
        run,
        ("pretrain",),
        training__steps=60,
        training__save_every=10,
        training__rank_timeout=6.0,
        training__eval_rows=0,
    )
    with TwoHosts(tmp_path / "hosts") as hosts:
        reach = start_ssh(hosts, tmp_path / "ssh")
        command = deepspeed(tmp_path / "hostfile", "--stage", "pretrain")
        program = hosts[0].start(command, run, **reach)
        assert until(lambda: last_step(run, "pretrain") >= 20, 120), program.printed()[-6000:]
        kill_rank(hosts)
        assert until(lambda: not hosts[0].ranks(), BOUND), program.printed()[-6000:]
        assert program.ended(BOUND) not in (None, 0), program.printed()[-6000:]
        assert re.search(r"failed: rank 1 .* on host-b.*step \d+", program.printed()), program.printed()[-6000:]
        program = hosts[0].start(command, run, **reach)
        assert program.ended(120) == 0, program.printed()[-6000:]
        assert re.search(r"resuming from step \d+", program.printed())
    assert [r["step"] for r in read_log(run, "pretrain") if "loss" in r] == list(range(1, 61))
    assert (run / "out" / "pretrain" / "done.json").exists() and not (run / "out" / "run.lock").exists()


def start(hosts: list[Host], run: Path, ahead: int = 0) -> list:
    """`ahead`: by how many seconds the clock of the second host is ahead."""
    launcher = (interpreter(inherited=True), "-m", "torch.distributed.run")
    return [
        host.start(torchrun(number, "--stage", "pretrain", launcher=launcher), run, ahead=number * ahead)
        for number, host in enumerate(hosts)
    ]
