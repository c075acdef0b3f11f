"""The proof that nothing was lost: a run that resumes after a fault is bit for bit the uninterrupted run."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranks import Ended, Ranks, run

from cook.base.files import sha256
from cook.report.events import TIMES
from tests.recipe.tiny_run import last_step, read_log, write_run

STAGE, STEPS, EVERY = "layer_mask", 12, 4
OPTIONS = ("--stage", STAGE)
NAME = re.compile(r"latest|step-\d+")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One fault that was tried."""

    survived: bool
    note: str = ""
    counts: bool = True
    """False: the fault could not happen here, and proves nothing."""


@dataclass
class Scene:
    """A folder in which the same run is started again and again.

    `run` is where it always works: paths in its files stay true. `base` holds it before the stage, `stopped` after the
    checkpoints of steps 4 and 8, `outcomes` what the uninterrupted run left, by number of ranks.
    """

    root: Path
    save_seconds: float = 0.0
    outcomes: dict[int, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run / "out" / STAGE / "checkpoints"

    def fresh(self, state: str = "base") -> Path:
        """The run's folder as it was at `base` or `stopped`."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.root / state, self.run)
        return self.run

    def keep(self, state: str) -> None:
        shutil.rmtree(self.root / state, ignore_errors=True)
        shutil.copytree(self.run, self.root / state)

    def published(self) -> list[int]:
        """Steps of the checkpoints that are there."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*"))


def prepare(root: Path, *, zero: int = 2, ranks: tuple[int, ...] = (2,)) -> Scene:
    """Trains the stage before, then the stage itself without any fault, and a copy that is stopped after step 8."""
    scene = Scene(root)
    shutil.rmtree(root, ignore_errors=True)
    write_run(
        scene.run,
        ("pretrain", STAGE),
        model__config__dropout_p=0.1,
        training__save_every=EVERY,
        training__steps=STEPS,
        training__rank_timeout=120.0,
        deepspeed__zero_optimization__stage=zero,
    )
    must(run(scene.run, ["--stage", "pretrain"]))
    scene.keep("base")
    for world in ranks:
        scene.fresh()
        with Ranks(scene.run, *OPTIONS, world=world) as started:
            started.until(lambda: (scene.checkpoints / f"tmp-{EVERY}").exists())
            began = time.monotonic()
            started.until(lambda: f"step-{EVERY}" in _latest(scene))
            scene.save_seconds = time.monotonic() - began
            must(started.wait())
        scene.outcomes[world] = outcome(scene.run)
    stop_after(scene, 9)
    assert scene.published() == [4, 8], scene.published()
    scene.keep("stopped")
    return scene


def stop_after(scene: Scene, step: int) -> None:
    """A run that is killed as a whole when the log has reached a step; before, only its own checkpoints are made."""
    scene.fresh()
    with Ranks(scene.run, *OPTIONS) as started:
        reached = started.until(lambda: last_step(scene.run, STAGE) >= step)
        saved = started.until(lambda: f"step-{step // EVERY * EVERY}" in _latest(scene))
        assert reached and saved, started.printed()


def _latest(scene: Scene) -> str:
    path = scene.checkpoints / "latest"
    return path.read_text() if path.exists() else ""


def must(ended: Ended) -> None:
    assert set(ended.codes) == {0}, ended


def outcome(folder: Path) -> dict[str, Any]:
    """What the stage writes, without times: its log, summary, weights, masks, last checkpoint."""
    stage = folder / "out" / STAGE
    log = [{k: v for k, v in record.items() if k not in TIMES} for record in read_log(folder, STAGE)]
    done = json.loads((stage / "done.json").read_text())
    done.pop("seconds")
    last = stage / "checkpoints" / f"step-{STEPS}"
    return {
        "log": log,
        "done": done,
        # The same content is written as the same bytes: weights, optimizer, gates, λ and the generators of all ranks.
        "checkpoint": {str(path.relative_to(last)): sha256(path) for path in sorted(last.rglob("*.pt"))},
        "weights": sha256(stage / "model" / "model.safetensors"),
        "mask": sha256(folder / "out" / "masks" / "layer.pt"),
    }


def resumes(
    scene: Scene, *, at_least: int, world: int = 2, note: str = "", before: Callable[[int], None] | None = None
) -> Trial:
    """Starts the run again after a fault, and compares the result with that of the uninterrupted run.

    Args:
        scene: The folder after the fault.
        at_least: The step that the run must resume from, or a later one; 0: there was no checkpoint yet.
        world: The number of ranks.
        note: A description of the fault, for the report.
        before: What each rank does first.
    """
    ended = run(scene.run, OPTIONS, world=world, before=before)
    problem = _problem(scene, ended, at_least, world)
    return Trial(survived=problem is None, note=f"{note}: {problem}\n{ended}" if problem else note)


def _problem(scene: Scene, ended: Ended, at_least: int, world: int) -> str | None:
    if set(ended.codes) != {0}:
        return "the run does not resume"
    found = re.search(r"resuming from step (\d+)", ended.out)
    if at_least and (not found or int(found.group(1)) < at_least):
        return f"resumed from {found.group(1) if found else 'nothing'}, not from {at_least}"
    left = sorted(path.name for path in scene.checkpoints.iterdir())
    # The newest two, and a signal's checkpoint may be one of them. An older one stays where the last save was killed
    # before it could be removed.
    if len(left) > 4 or not {"latest", f"step-{STEPS}"} < set(left) or not all(map(NAME.fullmatch, left)):
        return f"unexpected files are left: {left}"
    if _latest(scene) != f"step-{STEPS}\n":
        return f"latest says {_latest(scene)!r}"
    if (scene.run / "out" / "run.lock").exists():
        return "the lock is left"
    came, wanted = outcome(scene.run), scene.outcomes[world]
    different = [key for key in wanted if came[key] != wanted[key]]
    return f"not the same: {', '.join(different)}" if different else None
