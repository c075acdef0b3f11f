"""What the trainings of a task share: an engine on some weights, the loop, an evaluation, the model's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cook.base import distributed
from cook.base.distributed import say
from cook.base.errors import UserError
from cook.base.files import read_json, write_atomically, write_json
from cook.base.seeds import derived_seed, seed_everything
from cook.base.together import on_first_rank
from cook.base.watchdog import At
from cook.config.tasks import TaskConfig
from cook.config.types import TrainingConfig
from cook.data.loader import RowLoader
from cook.distill.distiller import RowDistiller
from cook.evaluation.predict import predict
from cook.families.encoder import Encoder, write_encoder
from cook.recipe.benchmarks.task import Judged, TaskData, TaskInfo
from cook.report.events import EventLog
from cook.training.checkpoint import find_checkpoint, load_checkpoint
from cook.training.engine import Engine
from cook.training.loop import Run, train
from cook.training.optim import finetuning_adamw
from cook.training.saver import Position

DONE = "done.json"


@dataclass(frozen=True, kw_only=True)
class Session:
    """A task, its data, and the model that is trained on it."""

    config: TaskConfig
    info: TaskInfo
    data: TaskData
    encoder: Encoder
    """The architecture and the tokenizer; the weights of a stage are given to `engine`."""
    at: At = lambda _step, _phase: None
    """Told of every step and save as it begins, for a watchdog."""
    _predicted: list[torch.Tensor] = field(default_factory=list, repr=False)
    """The own model's predictions for the training rows, once they have been asked for."""

    @property
    def steps(self) -> int:
        """Steps of a training."""
        return self.config.steps(len(self.data.train))

    def engine(self, weights: Mapping[str, torch.Tensor], training: TrainingConfig, *purpose: object) -> Engine:
        """An engine that starts from `weights`; dropout is drawn anew for every purpose and rank."""
        seed_everything(derived_seed(self.config.seed, *purpose, distributed.rank()))
        settings = self.config.deepspeed_config()
        if not training.learning_rate:
            settings.pop("scheduler", None)  # it would raise the rate from 0
        return Engine(self.encoder.build, weights, training, settings, finetuning_adamw)

    def fit(
        self,
        engine: Engine,
        training: TrainingConfig,
        folder: Path,
        name: str,
        *,
        identity: str,
        keeps: bool = True,
        start_step: int = 0,
        imitates: bool = False,
    ) -> None:
        """Runs the loop to the training's last step, from a checkpoint in `folder` if there is one.

        Args:
            engine: The model.
            training: How.
            folder: For the log and the checkpoints.
            name: Shown while it runs.
            identity: What the outcome depends on; a checkpoint of another one is refused.
            keeps: False: no log, no checkpoints.
            start_step: Step to begin after.
            imitates: Whether the predictions of the session's own model are imitated, as the config says.
        """
        position = Position(step=start_step, updates=start_step, tokens=0)
        checkpoints = folder / "checkpoints"
        found = find_checkpoint(checkpoints, self.config.resume) if keeps else None
        if found:
            position = load_checkpoint(*found, engine, None, fingerprint=identity)
            say(f"{name}: going on from step {position.step}")
        distiller = None
        if imitates and self.config.distillation:
            logits_RC = self._dense_logits(engine)
            distiller = RowDistiller(logits_RC, scale=self.config.distillation, temperature=self.config.temperature)
        writes = keeps and distributed.rank() == 0
        # The shuffle of one training is its own: two stages do not read their rows in one order.
        seed = derived_seed(self.config.seed, "order", name) % 2**32
        with EventLog(folder, self.config.tensorboard, enabled=writes) as log:
            on_first_rank(lambda: log.rewind(position.step if found else -1, position.log))
            if not found and self.data.notes:
                log.write({"step": 0, "data": list(self.data.notes)})
            engine.module.train()
            run = Run(
                name=name,
                engine=engine,
                training=training,
                attached=None,
                gates=None,
                batches=RowLoader(
                    self.data.train,
                    train_batch_size=training.train_batch_size,
                    seed=seed,
                    lengths=self.data.train.lengths,
                ),
                task_loss=self.info.loss,
                extra_loss=distiller,
                checkpoints=checkpoints,
                saves=keeps,
                fingerprint=identity,
                on_save=lambda: None,
                unit="rows",
                at=self.at,
            )
            train(run, position, log)
            on_first_rank(log.settle)
        self.at(training.steps, "preparing")  # an evaluation may take long

    def _dense_logits(self, engine: Engine) -> torch.Tensor:
        """What the session's own model predicts for the training rows, `[rows, classes]`; it reads them once."""
        if not self._predicted:
            teacher = self.encoder.build()
            for name, parameter in teacher.named_parameters():
                parameter.data.copy_(self.encoder.weights[name])
            outputs = predict(
                teacher.to(engine.device, engine.dtype).eval(),
                self.data.train,
                names=("logits",),
                batch_size=self.config.eval_batch_size,
                device=engine.device,
            )
            self._predicted.append(torch.from_numpy(np.stack([logits for (logits,) in outputs])).to(engine.device))
        return self._predicted[0]

    def evaluate(self, engine: Engine, folder: Path | None = None) -> dict[str, float]:
        """All of the task's metrics in percent, on every rank.

        Args:
            engine: The model.
            folder: Where the task's own files (SQuAD's predictions) go; None: they are not written.
        """
        engine.module.eval()
        metrics: dict[str, float] = {}
        for examination in self.data.examinations:
            outputs = predict(
                engine,
                examination.rows,
                names=self.info.outputs,
                batch_size=self.config.eval_batch_size,
                device=engine.device,
            )
            judged: Judged = examination.judge(outputs)
            metrics |= judged.metrics
            if folder is not None:
                for name, content in judged.files.items():
                    on_first_rank(partial(write_json, folder / name, content))
        engine.module.train()
        return {name: round(value, 4) for name, value in metrics.items()}

    def log(self, folder: Path, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Adds evaluations to a training's log: `after_recovery/acc` and the like at its last step."""
        record = {
            f"{when.replace(' ', '_')}/{name}": value
            for when, values in metrics.items()
            for name, value in values.items()
        }
        with EventLog(folder, self.config.tensorboard, enabled=distributed.rank() == 0) as log:
            log.write({"step": self.steps, **record})
            on_first_rank(log.settle)

    def save(self, engine: Engine, folder: Path) -> dict[str, torch.Tensor]:
        """Writes the model's folder; returns the weights, on every rank."""
        weights = dict(engine.full_weights())
        on_first_rank(lambda: write_encoder(folder, self.encoder.config, weights.items(), self.encoder.tokenizer))
        return weights


def identity_of(*parts: object) -> str:
    """Hash of what an outcome depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def weights_identity(weights: Mapping[str, torch.Tensor]) -> str:
    """Hash of the weights' values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name].numpy()).view(np.uint8).data)
    return digest.hexdigest()


def finished(folder: Path, identity: str, resume: str) -> dict | None:
    """The record of a finished training, if it is of this identity.

    Raises:
        UserError: it finished with other settings or other data.
    """
    path = folder / DONE
    if resume == "never" or not path.is_file():
        return None
    record = read_json(path)
    if not isinstance(record, dict) or record.get("identity") != identity:
        raise UserError(
            f"{path}: finished with other settings, other data or another model to start from",
            remedy="choose another --output_dir, restore the settings, or do it again with --resume never",
        )
    return record


def write_results(path: Path, sections: Mapping[str, Mapping[str, float]]) -> None:
    """The original's text file: `name = value` lines under a title a section."""
    blocks = [
        "\n".join([f"***** {title} *****", *(f"{name} = {value}" for name, value in sorted(metrics.items()))])
        for title, metrics in sections.items()
    ]
    write_atomically(path, "\n\n".join(blocks) + "\n")
