"""Ranks that receive signals, that are killed or suspended, or whose folder is in use."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator, Sequence
from random import Random

from proof import OPTIONS, STAGE, STEPS, Scene, Trial, outcome, resumes
from ranks import Ended, Ranks, run

from cook.training import checkpoint
from tests.recipe.tiny_run import last_step

RANK_TIMEOUT = 6.0
WATCHED = (*OPTIONS, "--set", f"training.rank_timeout={RANK_TIMEOUT}")
BOUND = 4 * RANK_TIMEOUT + 5
"""Seconds in which a run that has lost a rank must have ended: detection, grace, telling the others."""


def at_step(scene: Scene, ranks: Ranks, step: int) -> None:
    """Waits until the log has reached a step."""
    assert ranks.until(lambda: last_step(scene.run, STAGE) >= step), ranks.printed()


def signalled(
    scene: Scene, step: int, rank: int | None, kind: signal.Signals, pauses: Sequence[float], *options: str
) -> Ended:
    """A run whose rank, or all ranks, receive a signal once the log has reached a step, each time before a pause."""
    for _attempt in range(5):
        scene.fresh()
        with Ranks(scene.run, *OPTIONS, *options) as ranks:
            at_step(scene, ranks, step)
            for pause in pauses:
                ranks.kill(rank, kind)
                time.sleep(pause)
            ended = ranks.wait()
        # On a busy machine the run may be over before this process sees the step.
        if ended.codes != [0, 0] or f"{kind.name}: saving" in ended.out:
            break
    return ended


def signals(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """SIGTERM or SIGINT to one rank, or several times to both: all save the same step and end with 75."""
    for number in range(trials):
        rank = (1, 0, None)[number % 3]
        kind = random.choice((signal.SIGTERM, signal.SIGINT))
        pauses = [random.uniform(0, 0.05) for _ in range(1 if rank is not None else 3)]
        ended = signalled(scene, random.randrange(1, STEPS - 2), rank, kind, pauses)
        note = f"{kind.name} to {'both, three times' if rank is None else f'rank {rank}'}"
        saved = re.search(rf"saved step (\d+) of {STEPS}", ended.out)
        if ended.codes != [75, 75] or not saved or "Traceback" in ended.out:
            yield Trial(survived=False, note=f"{note}: {ended}")
        else:
            yield resumes(scene, at_least=int(saved.group(1)), note=note)


def save_and_continue(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """SIGUSR1 to one rank: one more checkpoint, and the run continues with the same result."""
    for number in range(trials):
        ended = signalled(scene, 1, number % 2, signal.SIGUSR1, (0.0,), "--set", "training.save_every=0")
        extra = any(step < STEPS for step in scene.published())
        same = set(ended.codes) == {0} and outcome(scene.run) == scene.outcomes[2]
        yield Trial(survived=same and extra, note=f"rank {number % 2}, an extra checkpoint: {extra}\n{ended}")


def lost_rank(scene: Scene, trials: int, random: Random, number: signal.Signals) -> Iterator[Trial]:
    """A rank that is killed or frozen in mid-step: the other ends in bounded time and names it and the step."""
    for index in range(trials):
        rank = 1 - index % 2
        scene.fresh()
        with Ranks(scene.run, *WATCHED) as ranks:
            at_step(scene, ranks, random.randrange(2, STEPS - 2))
            time.sleep(random.uniform(0, 0.05))
            newest = max(scene.published(), default=0)
            ranks.kill(rank, number)
            began = time.monotonic()
            ranks.until(lambda: not ranks.poll(), BOUND)
            seconds = time.monotonic() - began
            ended = ranks.wait(0.1)
        note = f"{number.name} of rank {rank}, over after {seconds:.1f} s"
        named = re.search(rf"rank {rank} .*step \d+", ended.out)
        # SIGKILL is what the frozen one gets from the other; the harness itself would send it only after the bound.
        if ended.codes[rank] != -signal.SIGKILL or ended.codes[1 - rank] != 76 or not named or seconds > BOUND:
            yield Trial(survived=False, note=f"{note}: {ended}")
        else:
            yield resumes(scene, at_least=newest, note=note)


def killed_ranks(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """SIGKILL of one rank."""
    yield from lost_rank(scene, trials, random, signal.SIGKILL)


def frozen_ranks(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """SIGSTOP of one rank."""
    yield from lost_rank(scene, trials, random, signal.SIGSTOP)


def taken_folder(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """A second run in the same folder is refused, and the first does not notice; a dead run's lock is taken over."""
    for _ in range(trials):
        scene.fresh()
        with Ranks(scene.run, *OPTIONS) as first:
            first.until(lambda: (scene.run / "out" / "run.lock").exists())
            first.output = first.output.with_suffix(".first")
            first.output.write_text("")
            second = run(scene.run, OPTIONS)
            ended = first.wait()
        refused = second.codes == [2, 2] and "another run is using" in second.out
        same = set(ended.codes) == {0} and outcome(scene.run) == scene.outcomes[2]
        yield Trial(survived=refused and same, note=f"second run {second}\nfirst {ended}")
        scene.fresh("stopped")
        assert (scene.run / "out" / "run.lock").exists(), "a killed run leaves its lock"
        yield resumes(scene, at_least=8, note="a killed run's lock")


def other_view(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """Rank 1 does not see the newest checkpoint, as on a shared folder that lags behind: all take the one before."""

    def blind(rank: int) -> None:
        if rank == 1:
            real = checkpoint.steps
            checkpoint.steps = lambda root: [step for step in real(root) if step != 8]

    for _ in range(trials):
        scene.fresh("stopped")
        yield resumes(scene, at_least=4, before=blind)
