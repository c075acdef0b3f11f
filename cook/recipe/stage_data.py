"""The data loader of a stage, its start position, the loss on its rows, and the reweighting of sources by losses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cook.base import distributed
from cook.base.distributed import say
from cook.base.files import read_json, write_json
from cook.base.modes import evaluating
from cook.base.watchdog import At
from cook.config.check_inputs import source_names
from cook.data.loader import RowLoader, held_out_batches
from cook.data.order import updated_weights
from cook.data.rows import JoinedRows, Rows
from cook.data.stream_loader import StreamLoader
from cook.data.streams import StreamedData
from cook.data.training_data import TrainingData, changed_files, read_files
from cook.evaluation.all_ranks import held_out_loss
from cook.recipe.plan import Stage
from cook.recipe.sources import changed
from cook.report.events import EventLog
from cook.training.engine import Engine

Loader = RowLoader | StreamLoader


def rows_before(stage: Stage) -> int:
    """Rows that earlier stages have read; this stage continues after them, so that no row repeats within an epoch."""
    before = stage.done_before
    return int(read_json(before)["rows"]) if before and before.exists() else 0


def open_loader(stage: Stage, data: TrainingData, *, ledger: bool = True) -> Loader:
    """Opens the loader of a stage at the row after the last one that the previous stage read.

    Args:
        stage: The plan.
        data: The stage's rows.
        ledger: False: samples are not recorded, even if the config requests a ledger.
    """
    config = stage.config
    options: dict[str, Any] = {
        "train_batch_size": config.training.train_batch_size,
        "seed": config.seed,
        "first": rows_before(stage),
        "ledger": stage.folder if config.data.ledger and ledger else None,
    }
    if isinstance(data.train, StreamedData):
        options |= {"rank": distributed.rank(), "world_size": distributed.world_size()}
        loader: Loader = StreamLoader(data.train, **options)
    else:
        loader = RowLoader(data.train, workers=config.data.workers, **options)
    before = stage.done_before
    state = read_json(before).get("data") if before and before.exists() else None
    if state and state["data"] == data.train.fingerprint:  # else the previous stage had other data
        loader.load_state_dict(state)
    return loader


def check_corpus(stage: Stage, *, resumed: bool) -> None:
    """Records the files of the corpus when a stage begins, and compares them when it is resumed.

    Raises:
        UserError: A file has changed since the stage began.
    """
    now, noted = read_files(stage.config.output_dir), stage.folder / "corpus.json"
    if not (resumed and noted.exists()):
        write_json(noted, now)
    elif changes := changed_files(read_json(noted), now):
        raise changed(f"{stage.name}: the corpus has changed since the stage began", changes)


def loss_of_rows(stage: Stage, engine: Engine, rows: Rows, number: int) -> float:
    """The loss of a model in eval mode on at most `number` of the rows, in nats per token; all ranks call it."""
    rank, world = distributed.rank(), distributed.world_size()
    batches = held_out_batches(rows, stage.config.training.rows_at_once(world), number, rank, world)
    return held_out_loss(engine, batches, engine.device)


class SourceMixer:
    """Updates the weights of data sources by their losses, and reports new epochs of sources.

    Args:
        stage: The plan.
        loader: The stage's loader.
        data: The stage's rows.
        engine: The model, which is evaluated on each source.
        log: The log of losses and weights.
        at: Called at every evaluation, for a watchdog.
    """

    def __init__(self, stage: Stage, loader: Loader, data: TrainingData, engine: Engine, log: EventLog, at: At):
        self._stage, self._loader, self._engine, self._log, self._at = stage, loader, engine, log, at
        self._mixing = stage.config.data.mixing
        self._names = source_names(stage.config.data)
        self._held_out = data.held_out
        self._epochs: list[int] | None = None

    def after_step(self, step: int) -> None:
        """Called after every step, on every rank."""
        training = self._stage.config.training
        if self._loader.weights is None or len(self._names) < 2:
            return
        if step % training.log_every == 0:
            self._report_epochs(step)
        if self._mixing and step % self._mixing.every == 0 and step < training.steps:
            self._mix(step)

    def _report_epochs(self, step: int) -> None:
        epochs = [int(epoch) for epoch in self._loader.epochs(step)]
        for name, epoch, known in zip(self._names, epochs, self._epochs or epochs, strict=True):
            if epoch > known:
                say(f"{self._stage.name}: step {step}: epoch {epoch + 1} of the source {name} begins")
        self._epochs = epochs

    def _mix(self, step: int) -> None:
        assert self._mixing is not None and isinstance(self._held_out, JoinedRows)
        assert self._loader.weights is not None
        self._at(step, "finishing")
        losses = self._losses(self._held_out.parts)
        references = [self._mixing.reference[name] for name in self._names]
        weights = updated_weights(self._loader.weights, losses, references)
        self._loader.reweigh(weights, step)
        self._log.write(
            {
                "step": step,
                "source_loss": dict(zip(self._names, losses, strict=True)),
                "source_weight": dict(zip(self._names, weights, strict=True)),
            }
        )

    def _losses(self, parts: Iterable[Rows]) -> list[float]:
        assert self._mixing is not None
        with evaluating(self._engine.module):
            return [loss_of_rows(self._stage, self._engine, rows, self._mixing.rows) for rows in parts]
