"""One run on two hosts (network namespaces) by the real torchrun: a rank, a host or the link is lost."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from proof import Scene, Trial

from tests.recipe.tiny_run import last_step, read_log, write_run
from tests.two_hosts import Host, TwoHosts, cut_in_save, missing, torchrun, until

STEPS, BOUND = 100, 45.0
LOSSES: tuple[tuple[str, Callable[[list[Host]], None], tuple[int, ...]], ...] = (
    ("SIGKILL of rank 1", lambda hosts: os.kill(hosts[1].ranks()[0], signal.SIGKILL), (0,)),
    ("the second host goes off", lambda hosts: hosts[1].power_off(), (0,)),
    ("the cable is cut", lambda hosts: hosts[1].cut(), (0, 1)),
    ("the cable is cut in mid-save", cut_in_save, (0, 1)),
    ("SIGKILL of rank 0", lambda hosts: os.kill(hosts[0].ranks()[0], signal.SIGKILL), (1,)),
    ("the first host goes off", lambda hosts: hosts[0].power_off(), (1,)),
    ("SIGSTOP of rank 1", lambda hosts: os.kill(hosts[1].ranks()[0], signal.SIGSTOP), (0,)),
    ("SIGSTOP of rank 0", lambda hosts: os.kill(hosts[0].ranks()[0], signal.SIGSTOP), (1,)),
)
"""What is lost, how, and the hosts whose ranks must report it."""


def lost(_: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """What is lost is named in bounded time, and the same command resumes and finishes the run."""
    if why := missing():
        yield Trial(survived=False, note=why, counts=False)
        return
    for name, fault, tellers in LOSSES[:trials]:
        with tempfile.TemporaryDirectory(prefix="cook-hosts-") as folder, TwoHosts(Path(folder) / "hosts") as hosts:
            run = Path(folder) / "run"
            write_run(run, ("pretrain",), training__steps=STEPS, training__save_every=10, training__rank_timeout=6.0)

            def start(hosts=hosts, run=run):
                return [host.start(torchrun(n, "--stage", "pretrain"), run) for n, host in enumerate(hosts)]

            programs, at = start(), random.randrange(20, STEPS - 30)
            begun = until(lambda run=run, at=at: last_step(run, "pretrain") >= at, 90)
            if not (begun and hosts[0].ranks() and hosts[1].ranks()):
                printed = "\n".join(program.printed()[-3000:] for program in programs)
                yield Trial(survived=False, note=f"{name}: the run has not begun\n{printed}")
                continue
            fault(hosts)
            over = all(until(lambda host=hosts[teller]: not host.ranks(), BOUND) for teller in tellers)
            told = [
                re.search(rf"failed: rank {1 - teller} .* on host-{'ba'[teller]}", programs[teller].printed())
                for teller in tellers
            ]
            for host in hosts:
                host.power_off()
                host.mend()
            if not (over and all(told)):
                printed = "\n".join(program.printed()[-3000:] for program in programs)
                yield Trial(survived=False, note=f"{name} after step {at}\n{printed}")
                continue
            programs = start()
            codes = [program.ended(120) for program in programs]
            whole = codes == [0, 0] and [r["step"] for r in read_log(run, "pretrain") if "loss" in r] == [
                *range(1, STEPS + 1)
            ]
            printed = "" if whole else "\n".join(program.printed()[-3000:] for program in programs)
            yield Trial(survived=whole, note=f"{name} after step {at}, then {codes}\n{printed}")
