"""The runner of every stage, of language models and of benchmark tasks: from its plan to its `done.json`."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from cook.base import distributed
from cook.base.distributed import on_first_rank, say
from cook.base.errors import UserError
from cook.base.files import read_json, write_json
from cook.base.watchdog import At
from cook.recipe.sources import PlannedStage, changed, changed_sources, check_masks, check_sources, note_sources
from cook.report.events import EventLog
from cook.training.checkpoint import Position, find_checkpoint, load_checkpoint
from cook.training.loop import Run, train


class StageRun(ABC):
    """One run of a stage: open → load → prepare → train → done.

    A subclass says what a kind of stage does in each of these steps. What finished, resumed and started over mean is
    defined here, once.

    Args:
        stage: The plan.
        resume: `auto`, `never`, or a checkpoint's folder.
        at: Called with the step and phase that begin, for a watchdog.
        tensorboard: Whether the log is also written for TensorBoard.
    """

    def __init__(self, stage: PlannedStage, *, resume: str, at: At, tensorboard: bool = False):
        self.resume, self.at = resume, at
        self.identity = ""
        """Hash of everything that the outcome depends on; a checkpoint is resumed only if it is equal."""
        self.log = EventLog(stage.folder, tensorboard, enabled=distributed.rank() == 0)
        self._plan, self._earlier_seconds = stage, 0.0

    @abstractmethod
    def open(self) -> None:
        """Reads and checks the model and the masks. Nothing is written before it has succeeded."""

    @abstractmethod
    def load(self) -> None:
        """Prepares the data, once the folder is ready."""

    @abstractmethod
    def prepare(self) -> list[Any]:
        """Makes what the training starts from. Returns what the outcome depends on besides the settings, as JSON."""

    @abstractmethod
    def train(self) -> Callable[[], dict[str, Any]]:
        """Trains, evaluates and writes the model.

        Returns:
            A function that the first rank calls. It writes the remaining files and returns the record of the stage.
        """

    def conclude(self) -> None:  # noqa: B027 (most stages have nothing to conclude)
        """Called on the first rank once the stage has finished, in this run or an earlier one."""

    def run(self) -> None:
        """Runs or resumes the stage, unless it has already finished.

        Raises:
            UserError: inputs are missing or do not fit, or the folder holds a run with other settings.
            Interrupted: stopped by a signal, after saving.
        """
        stage = self._plan
        if on_first_rank(lambda: is_finished(stage, self.resume)):
            say_finished(stage)
            on_first_rank(self.conclude)
            return
        self.at(0, "preparing")
        self.open()
        if self.resume == "never" and distributed.rank() == 0:
            shutil.rmtree(stage.folder, ignore_errors=True)
        distributed.barrier()
        on_first_rank(lambda: check_sources(stage, self.resume))
        self.load()
        on_first_rank(lambda: note_sources(stage))
        self.at(0, "starting")
        self.identity = hash_of([stage.fingerprint(), *self.prepare()])
        started = time.perf_counter()
        with self.log:
            record = self.train()
            seconds = self._earlier_seconds + time.perf_counter() - started
            on_first_rank(self.log.settle)
            on_first_rank(lambda: self._write_done(record(), seconds))
        on_first_rank(self.conclude)
        distributed.barrier()

    def fit(
        self,
        run: Run,
        *,
        start: Position | None = None,
        notes: Sequence[str] = (),
        begin: Callable[[bool], None] = lambda _resumed: None,
        ready: Callable[[bool], None] = lambda _resumed: None,
    ) -> Position:
        """Trains to the last step, from the newest checkpoint if there is one.

        Args:
            run: The training.
            start: Where it begins without a checkpoint.
            notes: Sentences on the data, for the first record of the log.
            begin: Called on the first rank before the first step; receives whether the training is resumed.
            ready: Called on all ranks once the checkpoint is loaded, if there is one; receives whether there is.
        """
        found = find_checkpoint(run.checkpoints, self.resume)
        on_first_rank(lambda: begin(found is not None))
        position = start or Position(step=0, tokens=0)
        if found:
            position = load_checkpoint(
                *found, run.engine, run.gates, fingerprint=self.identity, projections=run.projections
            )
            self._earlier_seconds = position.seconds
            saved_by = found[1]["world_size"]
            others = f", saved by {saved_by} rank(s)" if saved_by != distributed.world_size() else ""
            say(f"{run.name}: resuming from step {position.step}{others}")
        ready(found is not None)
        on_first_rank(lambda: self.log.rewind(position.step if found else -1, position.log))
        if run.gate_log:
            run.gate_log.rewind(position.step if found else -1)
        if not found and notes:
            self.log.write({"step": 0, "data": list(notes)})
        return train(run, position, self.log)

    def _write_done(self, record: dict[str, Any], seconds: float) -> None:
        stage = self._plan
        common = {
            "stage": stage.name,
            "fingerprint": stage.fingerprint(),
            "identity": self.identity,
            "follows": follows(stage),
            "seconds": round(seconds, 1),
        }
        write_json(stage.done, common | record)


def hash_of(parts: Sequence[Any]) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def say_finished(stage: PlannedStage) -> None:
    """Prints that the stage has already finished."""
    say(f"{stage.name}: already finished, see {stage.done}")


def is_finished(stage: PlannedStage, resume: str) -> bool:
    """Whether the stage has finished and is not to be redone.

    Raises:
        UserError: it finished with other settings, or an earlier stage has been redone since.
    """
    path = stage.done
    if resume != "auto" or not path.exists():
        return False
    done, redo = read_json(path), f"redo the stage: {stage.redo} --resume never"
    if done.get("fingerprint") != stage.fingerprint():
        raise UserError(
            f"{path}: {stage.name} finished with other settings",
            remedy=f"choose another output_dir, restore the settings, or {redo}",
        )
    if changes := changed_sources(stage):
        raise changed(f"{path}: files have changed since {stage.name} finished", changes)
    if done["follows"] != follows(stage):
        raise UserError(f"{path}: {stage.after} has been redone since {stage.name} finished", remedy=redo)
    check_masks(stage)
    return True


def follows(stage: PlannedStage) -> str | None:
    """The identity of the finished stage that this stage starts from."""
    before = stage.done_before
    return read_json(before)["identity"] if before and before.exists() else None
