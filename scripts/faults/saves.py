"""Runs that are killed: in the middle of a save, at every named point of the protocol, in the middle of a step."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from random import Random

from lost import WATCHED, at_step
from proof import EVERY, OPTIONS, STAGE, STEPS, Scene, Trial, resumes
from ranks import Ranks

from cook.base import faults

REMOVING = "save.removing"
ON_RESUME = ("load.", "save.aside")
"""Points that only a resumed run reaches."""


def in_saves(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """kill -9 of the whole process group at a random moment of a random save."""
    killed = 0
    while killed < trials:
        scene.fresh()
        step = random.choice(range(EVERY, STEPS + 1, EVERY))
        scratch = scene.checkpoints / f"tmp-{step}"
        with Ranks(scene.run, *OPTIONS) as ranks:
            ranks.until(scratch.exists)
            time.sleep(random.uniform(0, 1.1 * scene.save_seconds))
            ranks.kill()
        if (scene.run / "out" / STAGE / "done.json").exists():
            yield Trial(survived=True, note="the run had already ended", counts=False)
            continue
        killed += 1
        published, left = scene.published(), scratch.exists()
        met = "half a checkpoint" if left else "a whole one" if step in published else "no files yet"
        yield resumes(scene, at_least=max(published, default=0), note=f"save of step {step}: {met}")


def at_points(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """kill -9 of one rank at every named point, on each rank; the other one must end by itself and name it."""
    # `while_deleting` kills at that point.
    points = [(name, rank) for name in faults.NAMES if name != REMOVING for rank in (0, 1)]
    for name, rank in points if trials >= len(points) else random.sample(points, trials):
        yield from _at_point(scene, name, rank, random)


def _at_point(scene: Scene, name: str, rank: int, random: Random) -> Iterator[Trial]:
    resumed = name.startswith(ON_RESUME)
    scene.fresh("stopped" if resumed else "base")
    if name == "save.aside":
        _damage_newest(scene)  # the step is saved once more, over the damaged one
    nth = 1 if resumed or name == REMOVING else random.choice((1, 2))
    with Ranks(scene.run, *WATCHED, environment={faults.VARIABLE: f"{name}:{rank}:{nth}"}) as ranks:
        ended = ranks.wait()
    note = f"{name} on rank {rank}, time {nth}"
    if ended.codes == [0, 0]:
        yield Trial(survived=True, note=f"{note}: this rank never comes there", counts=False)
    elif ended.codes[rank] != -signal.SIGKILL or ended.codes[1 - rank] not in (0, 76):
        yield Trial(survived=False, note=f"{note}: {ended}")
    elif ended.codes[1 - rank] == 76 and f"rank {rank}" not in ended.out:
        yield Trial(survived=False, note=f"{note}: not named: {ended}")
    else:
        valid = [step for step in scene.published() if not (name == "save.aside" and step == 8)]
        yield resumes(scene, at_least=max(valid, default=0), note=note)


def _damage_newest(scene: Scene) -> None:
    path = next((scene.checkpoints / "step-8").rglob("rng-0.pt"))
    path.write_bytes(path.read_bytes()[:-1])


def while_deleting(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """kill -9 while an old checkpoint is being deleted."""
    for number in range(trials):
        yield from _at_point(scene, REMOVING, number % 2, random)


def in_steps(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """kill -9 of the whole process group at a random moment of the run."""
    for _ in range(trials):
        scene.fresh()
        step = random.randrange(1, STEPS)
        with Ranks(scene.run, *OPTIONS) as ranks:
            at_step(scene, ranks, step)
            time.sleep(random.uniform(0, 0.05))
            ranks.kill()
        yield resumes(scene, at_least=max(scene.published(), default=0), note=f"after step {step}")
