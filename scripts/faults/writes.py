"""Files beside the checkpoints that cannot be written: the log, TensorBoard, masks, the model, done.json, the cache."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import failing_calls
from proof import OPTIONS, STAGE, Scene, Trial, resumes
from ranks import Ended, run

UNTRIED = Trial(survived=True, note="not tried: no compiler for the library that lets calls fail", counts=False)
KINDS = {
    "the cache": "/out/data/",
    "data.json": "data.json",
    "corpus.json": "corpus.json",
    "the masks": "/out/masks/",
    "the log": f"/{STAGE}/log.jsonl",
    "the model": f"/{STAGE}/model/",
    "done.json": "done.json",
}
"""What is written beside the checkpoints, and a part of its path, or of that of the file beside it."""
BOARD = f"/{STAGE}/tensorboard/"
Limit = Callable[[int], None]


def failing(part: str, nth: int, code: int, *, for_good: bool) -> Limit:
    """For rank 0, which writes all of these."""

    def before(rank: int) -> None:
        if rank == 0:
            failing_calls.arm(part, nth, code, for_good=for_good)

    return before


def broken(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """A disk that is full, or breaks, at a random call on each kind of file."""
    kinds = list(KINDS.items())
    for number in range(trials):
        kind, part = kinds[number % len(kinds)]
        code = random.choice((errno.ENOSPC, errno.EIO))
        scene.fresh()
        if kind in ("the cache", "data.json"):
            shutil.rmtree(scene.run / "out" / "data")
        if not failing_calls.is_on():
            yield UNTRIED
            return
        ended = run(scene.run, OPTIONS, before=failing(part, random.choice((1, 2, 3)), code, for_good=True))
        note = f"{kind}, {errno.errorcode[code]}"
        yield _refused(ended, note, os.strerror(code)) or resumes(scene, at_least=0, note=note)


def _refused(ended: Ended, note: str, word: str) -> Trial | None:
    told = word in ended.out and "remedy: " in ended.out and "Traceback" not in ended.out
    return None if ended.codes == [1, 1] and told else Trial(survived=False, note=f"{note}: {ended}")


def passing(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """The log or TensorBoard cannot be written for a moment, or TensorBoard never: the run continues."""
    cases = [("the log", KINDS["the log"], False), ("TensorBoard", BOARD, False), ("TensorBoard", BOARD, True)]
    options = (*OPTIONS, "--set", "logging.tensorboard=true")
    for number in range(trials):
        if not failing_calls.is_on():
            yield UNTRIED
            return
        kind, part, for_good = cases[number % len(cases)]
        scene.fresh()
        before = failing(part, random.choice((1, 2, 5)), errno.EIO, for_good=for_good)
        ended = run(scene.run, options, before=before)
        note = f"{kind} {'for good' if for_good else 'once'}"
        if ended.codes != [0, 0] or "warning" not in ended.out or "Traceback" in ended.out:
            yield Trial(survived=False, note=f"{note}: {ended}")
        else:
            yield resumes(scene, at_least=0, note=note)


def small_disk(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """A real file system that is too small for the model's folder."""
    for _ in range(trials):
        folder = scene.fresh() / "out" / STAGE / "model"
        folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            yield Trial(survived=True, note="not tried: mounting a small file system is not allowed here", counts=False)
            return
        try:
            ended = run(scene.run, OPTIONS)
            left = list(folder.iterdir())
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        wrong = _refused(ended, "a small disk", "No space left on device")
        if left:
            wrong = Trial(survived=False, note=f"a small disk: left {left}")
        yield wrong or resumes(scene, at_least=12, note="a small disk")


ABORTED = -6
"""Exit code of a rank without descriptors or memory for gloo's threads: its C++ ends the process."""
UNLOADED = 127
"""Exit code of a rank without memory for a library that it loads late: the dynamic loader ends the process."""


def limits(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """Few open files, little memory, on one rank or on both."""
    for number in range(trials):
        scene.fresh("stopped")
        limited = ((0, 1), (1,), (0,))[number % 3]
        files = number % 2 == 0
        amount = random.randrange(12, 60) if files else random.randrange(1, 80) << 20

        def limit(rank: int, limited: tuple[int, ...] = limited, files: bool = files, amount: int = amount) -> None:
            if rank not in limited:
                return
            if files:
                resource.setrlimit(resource.RLIMIT_NOFILE, (amount, amount))
            else:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + amount, used + amount))

        ended = run(scene.run, OPTIONS, before=limit)
        note = f"{amount} {'open files' if files else 'more bytes'} on ranks {limited}"
        if ended.codes == [0, 0]:
            yield Trial(survived=True, note=f"{note}: that is enough", counts=False)
        elif "Traceback" in ended.out or not set(ended.codes) <= {1, 2, 76, ABORTED, UNLOADED}:
            yield Trial(survived=False, note=f"{note}: {ended}")
        else:
            yield resumes(scene, at_least=8, note=note)
