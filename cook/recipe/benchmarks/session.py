"""The shared parts of a task's trainings: engine, training loop, evaluation, and saving the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cook.base import distributed
from cook.base.distributed import on_first_rank
from cook.base.files import write_atomically, write_json
from cook.base.modes import evaluating
from cook.base.seeds import derived_seed, seed_everything
from cook.config.tasks import TaskConfig
from cook.config.types import TrainingConfig
from cook.data.loader import RowLoader
from cook.distill.distiller import RowDistiller
from cook.evaluation.all_ranks import predict
from cook.families.encoder import Encoder, write_encoder
from cook.families.source import placed
from cook.recipe.benchmarks.task import Scores, TaskData, TaskInfo
from cook.training.engine import Engine
from cook.training.optim import finetuning_adamw


@dataclass(frozen=True, kw_only=True)
class Session:
    """A task, its data, and the model to train on it."""

    config: TaskConfig
    info: TaskInfo
    data: TaskData
    encoder: Encoder
    """The architecture and the tokenizer; the weights of a stage are given to `engine`."""
    _predicted: list[torch.Tensor] = field(default_factory=list, repr=False)
    """The session's model's predictions for the training rows, computed on first use."""

    @property
    def steps(self) -> int:
        """Number of steps of a training."""
        return self.config.steps(len(self.data.train))

    def engine(self, weights: Mapping[str, torch.Tensor], training: TrainingConfig, *purpose: object) -> Engine:
        """Creates an engine from `weights`; the dropout seed depends on `purpose` and rank."""
        seed_everything(derived_seed(self.config.seed, *purpose, distributed.rank()))
        settings = self.config.deepspeed_config()
        if not training.learning_rate:
            settings.pop("scheduler", None)  # it would change the learning rate of 0
        return Engine(self.encoder.build, weights, training, settings, finetuning_adamw)

    def batches(self, name: str) -> RowLoader:
        """The training rows. Each training has its own shuffle: two stages read their rows in different orders."""
        return RowLoader(
            self.data.train,
            train_batch_size=self.config.train_batch_size,
            seed=derived_seed(self.config.seed, "order", name) % 2**32,
            lengths=self.data.train.lengths,
        )

    def distiller(self, engine: Engine) -> RowDistiller | None:
        """Distils from the session's model, if the config asks for it."""
        if not self.config.distillation:
            return None
        logits_RC = self._dense_logits(engine)
        return RowDistiller(logits_RC, scale=self.config.distillation, temperature=self.config.temperature)

    def _dense_logits(self, engine: Engine) -> torch.Tensor:
        """The predictions of the session's model for the training rows, `[rows, classes]`, computed once."""
        if not self._predicted:
            teacher = self.encoder.build()
            for name, parameter in teacher.named_parameters():
                parameter.data.copy_(self.encoder.weights[name])
            outputs = predict(
                placed(teacher, engine.device, engine.dtype).eval(),
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
            folder: The folder for the task's files (SQuAD's predictions); None: they are not written.
        """
        metrics: dict[str, float] = {}
        for evaluation in self.data.evaluations:
            with evaluating(engine.module):
                outputs = predict(
                    engine,
                    evaluation.rows,
                    names=self.info.outputs,
                    batch_size=self.config.eval_batch_size,
                    device=engine.device,
                )
            scores: Scores = evaluation.score(outputs)
            metrics |= scores.metrics
            if folder is not None:
                for name, content in scores.files.items():
                    on_first_rank(partial(write_json, folder / name, content))
        return {name: round(value, 4) for name, value in metrics.items()}

    def save(self, engine: Engine, folder: Path) -> dict[str, torch.Tensor]:
        """Writes the model folder; returns the weights, on every rank."""
        weights = dict(engine.full_weights())
        on_first_rank(lambda: write_encoder(folder, self.encoder.config, weights.items(), self.encoder.tokenizer))
        return weights


def weights_identity(weights: Mapping[str, torch.Tensor]) -> str:
    """Hash of the weights' values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name].numpy()).view(np.uint8).data)
    return digest.hexdigest()


def write_results(path: Path, sections: Mapping[str, Mapping[str, float]]) -> None:
    """Writes the original's text file: `name = value` lines under one title per section."""
    blocks = [
        "\n".join([f"***** {title} *****", *(f"{name} = {value}" for name, value in sorted(metrics.items()))])
        for title, metrics in sections.items()
    ]
    write_atomically(path, "\n\n".join(blocks) + "\n")
