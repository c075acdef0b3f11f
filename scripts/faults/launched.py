"""The real `deepspeed` and `torchrun`: stopped by a signal, killed while ranks start, with a rank that is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from random import Random

from proof import EVERY, OPTIONS, STAGE, Scene, Trial, resumes
from ranks import ROOT, free_port

from cook.training import checkpoint
from tests.recipe.tiny_run import last_step

NAMES = ("deepspeed", "torchrun")
CODES = {"deepspeed": (256 - signal.SIGKILL, 76), "torchrun": (1,)}
"""What a launcher ends with where one rank was killed: `deepspeed` with the code of the rank that it saw end first."""
BOUND = 40.0
"""Seconds in which all must be over: launchers wait 30 s for the ranks that they stop."""


class Launched:
    """A run under a launcher; a context manager that leaves nothing of it behind."""

    def __init__(self, scene: Scene, name: str, *options: str):
        script = str(ROOT / "cook" / "train.py")
        start = {
            "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), script],
            "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script],
        }[name]
        self.scene, self.mark = scene, uuid.uuid4().hex
        self.output = scene.run.parent / f"{name}.out"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with open(self.output, "w") as out:
            self.launcher = subprocess.Popen(
                [*start, "--config", "bmcook.json", *OPTIONS, *options],
                cwd=scene.run,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, "PATH": path, "COOK_FAULT": self.mark},
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    def left(self, rank: int | None = None) -> list[int]:
        """The processes of this run that do anything; with `rank` that rank's own."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdecimal() else []
                if f"COOK_FAULT={self.mark}".encode() not in environment:
                    continue
                if rank is not None:
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                    script = any(part.endswith(b"train.py") for part in command[1:3])
                    if f"RANK={rank}".encode() not in environment or not script:
                        continue
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def until_step(self, step: int) -> bool:
        """Waits for a step of the log, at most until the launcher ends; says whether it has come."""

        def reached() -> bool:
            return last_step(self.scene.run, STAGE) >= step

        return _until(lambda: reached() or self.launcher.poll() is not None, 120) and reached()

    def over(self, seconds: float = BOUND) -> bool:
        """Waits until nothing of the run is left; says whether that came in time."""
        return _until(lambda: self.launcher.poll() is not None and not self.left(), seconds)

    def printed(self) -> str:
        return self.output.read_text(errors="replace")


def described(pid: int) -> str:
    """A process that should have ended: its command, state and parent, and where each of its threads waits."""
    try:
        folder = Path("/proc") / str(pid)
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        waits = [(task / "wchan").read_text() for task in sorted((folder / "task").iterdir())]
    except OSError as error:
        return f"{pid}: {error}"
    return f"{pid}, state {state}, child of {parent}, in {waits}: {command}"


def told_to_stop(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """SIGTERM to the launcher: the ranks save, nothing is left running, the run can be resumed."""
    for name in NAMES[:trials]:
        scene.fresh()
        steps = ("--set", "training.steps=4000", "--set", "training.save_every=0")
        with Launched(scene, name, *steps) as run:
            run.until_step(5)
            run.launcher.send_signal(signal.SIGTERM)
            over, left = run.over(90), run.left()
        printed = run.printed()
        note = f"{name} ended with {run.launcher.returncode}, {len(left)} left running, saved {scene.published()}"
        # What it saved is of a longer run; that it is whole is what counts here. torchrun ends with 1 whatever comes.
        ended = run.launcher.returncode in (1, -signal.SIGTERM) and "stopped: " in printed
        right = over and ended and bool(scene.published())
        sound = right and checkpoint.find_checkpoint(scene.checkpoints, "auto") is not None
        yield Trial(survived=sound, note=note if sound else f"{note}\n{printed[-3000:]}")


def gone_while_starting(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """A launcher that is stopped or killed soon after it started its ranks: they end, too."""
    for number in range(trials):
        name = NAMES[(number + 1) % 2]
        kind = signal.SIGTERM if name == "deepspeed" else signal.SIGKILL
        scene.fresh()
        with Launched(scene, name, "--set", "training.steps=100000") as run:
            _until(lambda run=run: bool(run.left(0)) and bool(run.left(1)), 60)
            pause = 1.0 if number < 2 else random.uniform(0, 6)
            time.sleep(pause)
            run.launcher.send_signal(kind)
            began = time.monotonic()
            over, left = run.over(), [described(pid) for pid in run.left()]
        seconds = time.monotonic() - began
        note = f"{kind.name} to {name} {pause:.1f} s after its ranks began: over after {seconds:.1f} s"
        clean = over and "Traceback" not in run.printed().partition("torch/distributed")[0]
        yield Trial(survived=clean, note=note if clean else f"{note}, left {left}\n{run.printed()[-3000:]}")


def lost_rank(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """SIGKILL of a rank: the other one names it and the step and ends with 76, although its launcher stops it."""
    for number in range(trials):
        name, rank = NAMES[number % 2], 1 - number // 2 % 2
        scene.fresh()
        with Launched(scene, name) as run:
            began = run.until_step(EVERY + 1)
            newest = max(scene.published(), default=0)
            for pid in run.left(rank):
                os.kill(pid, signal.SIGKILL)
            over = run.over()
        printed, code = run.printed(), run.launcher.returncode
        note = f"{name}, rank {rank} killed: ended with {code}"
        named = re.search(rf"failed: rank {rank} .*has died.*step \d+", printed)
        if not (began and over and named and code in CODES[name]) or "stopped: " in printed:
            yield Trial(survived=False, note=f"{note}\n{printed[-4000:]}")
        else:
            yield resumes(scene, at_least=newest, note=note)


def _until(happened, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
