"""Small jobs of three gloo ranks under a watchdog, one of which does something wrong: `lost_ranks.py OUT.json CASE…`.

All cases run side by side, forked from this process, which has only imported what they need.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parents[2])

from cook.base.distributed import all_reduce_sum  # noqa: E402
from cook.base.errors import EXIT_RANK_LOST, Interrupted, RunFailed, run_entry  # noqa: E402
from cook.base.outcome import Outcome, recorded_code  # noqa: E402
from cook.base.rendezvous import join, meet  # noqa: E402
from cook.base.signals import Request, Signals, ending_quietly, heed_launcher  # noqa: E402
from cook.base.watchdog import Watchdog  # noqa: E402

WORLD, STEPS, BAD_STEP = 3, 40, 8
TIMEOUT = 3.0


def misbehave(case: str, rank: int) -> None:
    """What happens at the bad step."""
    kind, _, which = case.partition(" ")
    if which and int(which) != rank:
        return
    if kind in ("killed", "wrapped"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "stuck":
        time.sleep(1000)
    elif kind == "fails":
        raise ValueError("an error of one rank")
    elif kind == "agree":
        raise RunFailed("an error of all ranks")


def job(case: str, rank: int, outcome: Outcome) -> None:
    """Training, as a watchdog sees it."""
    heed_launcher()
    meeting = meet()
    timeout = 0.0 if case == "unwatched" else TIMEOUT
    with ending_quietly(), outcome, Watchdog(timeout, meeting) as watchdog, Signals() as signals:
        outcome.taken()
        watchdog.at_loss = lambda verdict: outcome.write(EXIT_RANK_LOST, verdict)
        join("gloo", meeting, timedelta(minutes=5))
        for step in range(1, STEPS + 1):
            watchdog.at(step, "step")
            time.sleep(0.01)
            if step == BAD_STEP:
                misbehave(case, rank)
                if case == "slow":
                    watchdog.at(step, "saving")
                    time.sleep(2 * TIMEOUT)
            try:
                stop = all_reduce_sum(torch.tensor(float(Request.STOP in signals.take())))
            except RuntimeError as error:
                if case == "wrapped 1":  # as a save in the background reports it
                    raise RunFailed(f"the checkpoint could not be written: {error}") from None
                raise
            if stop:
                raise Interrupted(f"at step {step}")
            if case == "launcher":
                print("begun", flush=True)
                time.sleep(0.1)  # the launcher goes at some step
    torch.distributed.destroy_process_group()


def rank_of(case: str, rank: int, port: int, out: Path) -> None:
    handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(handle, number)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD))
    code: Any = 70
    try:
        run_entry(lambda: job(case, rank, Outcome(f"{out}.run", rank)))
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        print(f"raised {type(error).__name__}: {error}", flush=True)
        code = 1
    finally:
        Path(f"{out}.{rank}").write_text(str(code))
        os._exit(code)


def launch(case: str, folder: Path) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folder / case.replace(" ", "-")
    pids = []
    for rank in range(WORLD):
        pid = os.fork()
        if not pid:
            rank_of(case, rank, port, out)
        pids.append(pid)
    return pids


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would not be sound"
    ranks = {}
    for case in cases:
        if case == "launcher":
            launcher = os.fork()
            if not launcher:
                launch(case, folder)
                while "begun" not in (folder / case).read_text():
                    time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGKILL)
            os.waitpid(launcher, 0)
        else:
            ranks[case] = launch(case, folder)
    results = {}
    for case, pids in ranks.items():
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        out = folder / case.replace(" ", "-")
        results[case] = {"codes": codes, "out": out.read_text(), "outcome": recorded_code(f"{out}.run")}
    if "launcher" in cases:  # nobody's children any more: they leave their codes in files
        files = [folder / f"launcher.{rank}" for rank in range(WORLD)]
        deadline = time.monotonic() + 20
        while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
            time.sleep(0.1)
        codes = [int(file.read_text()) for file in files if file.exists()]
        out, outcome = (folder / "launcher").read_text(), recorded_code(folder / "launcher.run")
        results["launcher"] = {"codes": codes, "out": out, "outcome": outcome}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
