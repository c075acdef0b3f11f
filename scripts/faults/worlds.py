"""A run that resumes with another number of ranks: the same global batches, the losses of the uninterrupted run."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from lost import at_step
from proof import EVERY, OPTIONS, STAGE, STEPS, Scene, Trial, must
from ranks import Ranks, run

from cook.base.files import read_json, write_json
from tests.recipe.tiny_run import read_log

CHANGES = ((2, 1), (1, 2), (2, 1, 2))
TOLERANCE = 1e-4
"""Largest relative difference of a loss, fp32: the same sums in another order, over twelve steps of Adam."""


def changed(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """2→1, 1→2, 2→1→2. Without dropout, whose noise belongs to a rank."""
    _fresh(scene)
    must(run(scene.run, OPTIONS))
    wanted = _losses(scene)
    for worlds in CHANGES[:trials]:
        _fresh(scene)
        for part, world in enumerate(worlds, start=1):
            with Ranks(scene.run, *OPTIONS, world=world) as ranks:
                if part < len(worlds):
                    at_step(scene, ranks, part * EVERY + 1)
                    ranks.until(lambda part=part: part * EVERY in scene.published())
                    ranks.kill()
                else:
                    ended = ranks.wait()
        note = "→".join(map(str, worlds))
        if set(ended.codes) != {0} or "resuming from step" not in ended.out:
            yield Trial(survived=False, note=f"{note}: {ended}")
            continue
        came = _losses(scene)
        worst = max(abs(came.get(step, 0.0) - loss) / abs(loss) for step, loss in wanted.items())
        right = list(came) == list(range(1, STEPS + 1)) and worst <= TOLERANCE
        yield Trial(survived=right, note=f"{note}: largest relative difference of a loss {worst:.1e}")


def _fresh(scene: Scene) -> None:
    path = scene.fresh() / "out" / "pretrain" / "model" / "config.json"
    config = read_json(path)
    assert config["dropout_p"] > 0
    write_json(path, config | {"dropout_p": 0.0})


def _losses(scene: Scene) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(scene.run, STAGE) if "loss" in record}
