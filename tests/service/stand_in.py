"""A supervisor whose job is a small program in place of the trainer. The supervisor itself is the real one.

    python tests/service/stand_in.py JOBFOLDER N         # the supervisor
    python tests/service/stand_in.py --program           # the program, in the job's run folder
    python tests/service/stand_in.py --python PYTHON JOBFOLDER N    # the real commands, run by another interpreter

The program reads the job's `bmcook.json`: `seconds` to work, `code` to end with, `ranks` to start as a launcher does,
`ignores_term`, `leftover`: seconds that a process without a parent lives on, `kill`: a signal that it sends itself,
`silent`: no outcome.json. It resumes: `out/progress` holds the seconds of work that are done. `ledger` has one line per
event: `overlap` if two of it ever ran at the same time in one job.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TICK = 0.02


def note(line: str) -> None:
    with open("ledger", "a") as file:
        file.write(f"{line}\n")


def work(settings: dict) -> int:
    lock = open("running.lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note("overlap")
        return 1
    progress = Path("out/progress")
    done = float(progress.read_text()) if progress.exists() else 0.0
    stops: list[int] = []

    def stop(number: int, _frame: object) -> None:
        if not settings.get("ignores_term"):
            stops.append(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR1, lambda *_: note("saved"))
    note(f"started at {done:.2f} as {os.environ['COOK_JOB']}")
    if settings.get("leftover"):
        quiet = f"import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep({settings['leftover']})"
        subprocess.Popen([sys.executable, "-ISc", quiet], start_new_session=True)
    while done < settings.get("seconds", 0.1) and not stops:
        time.sleep(TICK)
        done += TICK
    aside = Path("out/.progress")
    aside.write_text(str(done))
    aside.replace(progress)
    if "kill" in settings:
        os.kill(os.getpid(), settings["kill"])
    return 75 if stops else settings.get("code", 0)


def launch(settings: dict) -> int:
    """Starts ranks and ends with 1 if one fails. Like torchrun's, its own SIGTERM would kill them."""
    ranks = [
        subprocess.Popen([sys.executable, "-IS", __file__, "--program"], env=os.environ | {"LOCAL_RANK": str(rank)})
        for rank in range(settings["ranks"])
    ]

    def kill(*_: object) -> None:
        for each in ranks:
            each.kill()
        note("launcher signalled")

    signal.signal(signal.SIGTERM, kill)
    return 1 if any([each.wait() for each in ranks]) else 0


def main() -> int:
    settings = json.loads(Path("../config/bmcook.json").read_text())
    Path("out").mkdir(exist_ok=True)
    if settings.get("ranks") and "LOCAL_RANK" not in os.environ:
        return launch(settings)
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        while os.getppid() != 1 and not Path("out/outcome.json").exists():
            time.sleep(TICK)
        return 0
    code = work(settings)
    if not settings.get("silent"):
        Path("out/.outcome").write_text(json.dumps({"code": code, "message": f"the stand-in ended with {code}"}))
        Path("out/.outcome").replace("out/outcome.json")
    note(f"ended with {code}")
    return code


if __name__ == "__main__":
    if sys.argv[1] == "--program":
        sys.exit(main())
    from dataclasses import replace

    from cook.service.steps import Step, steps_of
    from cook.service.supervisor import supervise

    if sys.argv[1] == "--python":  # the real commands, with a warm interpreter
        python = sys.argv.pop(2)
        del sys.argv[1]
        sys.exit(
            supervise(
                Path(sys.argv[1]),
                int(sys.argv[2]),
                lambda job: [replace(step, command=[python, *step.command[1:]]) for step in steps_of(job)],
            )
        )
    program = Step(name="train", command=[sys.executable, "-IS", __file__, "--program"], trains=True, launches=True)
    sys.exit(supervise(Path(sys.argv[1]), int(sys.argv[2]), lambda _: [program]))
