"""The stages of a benchmark run: fine-tuning of a dense model; pruning by scores, with a recovery."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cook.base import distributed
from cook.base.distributed import on_all_ranks, on_first_rank, say
from cook.base.errors import UserError
from cook.base.files import read_json, sha256, write_json
from cook.base.seeds import derived_seed
from cook.base.tensor_files import open_safetensors_folder
from cook.base.watchdog import At
from cook.config.tasks import TaskConfig
from cook.families.encoder import Encoder, open_encoder
from cook.families.registry import by_config, knows
from cook.recipe.benchmarks.session import Session, weights_identity, write_results
from cook.recipe.benchmarks.task import load_task, task_info
from cook.recipe.benchmarks.task_plan import TaskStage, pattern_spec, pretrain_stage, prune_stages
from cook.recipe.benchmarks.task_report import write_prune_report
from cook.recipe.pattern import check_divisible, gather_scores
from cook.recipe.runner import StageRun, follows
from cook.sparsity.matrices import PrunedMatrix, encoder_matrices, matrices_of
from cook.sparsity.pattern_file import read_pattern_masks, write_pattern_masks
from cook.sparsity.pattern_masks import apply_masks, make_masks, sparsity_table
from cook.sparsity.scores import ScoreAccumulator
from cook.training.checkpoint import Position
from cook.training.engine import Engine
from cook.training.loop import Run
from cook.training.settings import check_settings

Metrics = Mapping[str, float]
BEFORE, PRUNED, RECOVERED = "before pruning", "after pruning", "after recovery"


def run_pretrain(config: TaskConfig, at: At) -> None:
    """Fine-tunes the dense model."""
    FineTuning(pretrain_stage(config), lambda: open_session(config, config.model), at).run()


def run_prune(config: TaskConfig, at: At) -> None:
    """Prunes the fine-tuned model; each stage starts from the weights and masks of the previous one."""
    stages = prune_stages(config)
    # One session for all stages: its model is the dense one, which recoveries imitate.
    session = cache(lambda: open_dense_session(stages[0]))
    for stage in stages:
        PatternPruning(stage, session, at).run()


class TaskRun(StageRun):
    """What both kinds of stages share.

    Args:
        stage: The plan.
        session: Opens the model and the data; called if the stage has not finished.
        at: Called with the step and phase that begin, for a watchdog.
    """

    def __init__(self, stage: TaskStage, session: Callable[[], Session], at: At):
        super().__init__(stage, resume=stage.config.resume, at=at, tensorboard=stage.config.tensorboard)
        self.stage, self._session = stage, session

    def open(self) -> None:
        self.session = on_all_ranks(self._session)
        for note in (*self.session.encoder.notes, *self.session.data.notes):
            say(note)

    def load(self) -> None:
        """The data was read with the model, whose tokenizer it needs."""

    def recover(self, engine: Engine, *, start_step: int = 0, imitates: bool = False) -> Metrics:
        """Trains to the last step and returns the metrics after it."""
        stage, session = self.stage, self.session
        training = session.config.training(session.steps)
        say(
            f"\n{stage.name}: {len(session.data.train)} rows, {training.steps} steps × {training.train_batch_size} "
            f"rows; {engine.described()}"
        )
        engine.module.train()
        run = Run(
            name=stage.name,
            engine=engine,
            training=training,
            batches=session.batches(stage.name),
            task_loss=session.info.loss,
            extra_loss=session.distiller(engine) if imitates else None,
            checkpoints=stage.folder / "checkpoints",
            fingerprint=self.identity,
            unit="rows",
            at=self.at,
        )
        start = Position(step=start_step, updates=start_step, tokens=0)
        self.fit(run, start=start, notes=session.data.notes)
        self.at(training.steps, "preparing")  # an evaluation may take long
        return session.evaluate(engine, stage.folder)

    def write_log(self, metrics: Mapping[str, Metrics]) -> None:
        """Adds evaluations to the log: `after_recovery/acc` and the like at its last step."""
        record = {
            f"{when.replace(' ', '_')}/{name}": value
            for when, values in metrics.items()
            for name, value in values.items()
        }
        self.log.write({"step": self.session.steps, **record})

    def conclude(self) -> None:
        # The model is complete, so nothing resumes from the checkpoints.
        shutil.rmtree(self.stage.folder / "checkpoints", ignore_errors=True)


class FineTuning(TaskRun):
    """Fine-tunes the dense model."""

    def prepare(self) -> list[Any]:
        session = self.session
        if session.encoder.fresh:
            say(f"{self.stage.name}: {self.stage.source} has no head for {session.info.name}; a new one is trained")
        return [session.data.train.fingerprint, weights_identity(session.encoder.weights)]

    def train(self) -> Callable[[], dict[str, Any]]:
        session, folder = self.session, self.stage.folder
        engine = session.engine(session.encoder.weights, session.config.training(session.steps), "pretrain")
        metrics = self.recover(engine)
        self.write_log({"fine-tuned": metrics})
        session.save(engine, folder / "model")
        engine.close()
        say(f"{self.stage.name}: {shown(metrics)}")

        def finish() -> dict[str, Any]:
            write_results(folder / "eval_results.txt", {f"{session.info.name}, dense": metrics})
            return {"task": session.info.name, "metrics": metrics, "steps": session.steps, "masks": {}}

        return finish


class PatternPruning(TaskRun):
    """One stage of pruning: scores, masks, recovery."""

    def open(self) -> None:
        super().open()
        stage, encoder = self.stage, self.session.encoder
        self.spec, self.matrices = pattern_spec(stage.config), pruned_matrices(encoder)
        check_divisible(self.matrices, self.spec)
        self.weights: Mapping[str, torch.Tensor] = encoder.weights
        self.previous: Mapping[str, torch.Tensor] | None = None
        if stage.previous_masks:
            self.weights = dict(open_safetensors_folder(Path(stage.source)).items())
            self.previous, _ = read_pattern_masks(stage.previous_masks, self.matrices)

    def prepare(self) -> list[Any]:
        return [self.session.data.train.fingerprint, follows(self.stage) or weights_identity(self.weights)]

    def train(self) -> Callable[[], dict[str, Any]]:
        stage, session, spec, matrices = self.stage, self.session, self.spec, self.matrices
        scored = stage.folder / "scored.json"
        record = read_json(scored) if scored.is_file() else {}
        if record.get("identity") != self.identity:
            before, masks = self._score()
            record = {"identity": self.identity, "metrics": before}
            pattern = {"pattern": spec.name, "sparsity": stage.sparsity, "spec": dataclasses.asdict(spec)}
            on_first_rank(lambda: write_pattern_masks(stage.masks, masks, pattern))
            on_first_rank(lambda: write_json(scored, record))
        masks, _ = read_pattern_masks(stage.masks, matrices)
        metrics = {BEFORE: record["metrics"]}

        training = session.config.training(session.steps)
        masked = {path: tensor.clone() for path, tensor in self.weights.items()}
        apply_masks(masked, masks)
        engine = session.engine(masked, training, "recovery", stage.sparsity)
        engine.hold_zeros(masks, gradients_only=spec.quirks.drifting_weights)
        metrics[PRUNED] = session.evaluate(engine)
        say(f"{stage.name}: after pruning {shown(metrics[PRUNED])}")
        # The original counts on from the scoring steps, so that its learning rate reaches 0 too early.
        skipped = min(session.config.scoring_steps, training.steps) if spec.quirks.schedule_goes_on else 0
        metrics[RECOVERED] = self.recover(engine, start_step=skipped, imitates=True)
        self.write_log(metrics)
        session.save(engine, stage.folder / "model")
        engine.close()
        say(f"{stage.name}: after recovery {shown(metrics[RECOVERED])}")
        return lambda: self._record(metrics, masks)

    def conclude(self) -> None:
        super().conclude()
        config, dense = self.stage.config, prune_stages(self.stage.config)[0].source
        write_prune_report(config, task_info(config), pattern_spec(config), dense)

    def _score(self) -> tuple[Metrics, dict[str, torch.Tensor]]:
        """The metrics before pruning, and masks from gradients over the scoring steps with frozen weights."""
        stage, session, spec = self.stage, self.session, self.spec
        training = session.config.training(session.config.scoring_steps, frozen=True)
        engine = session.engine(self.weights, training, "scores", stage.sparsity)
        if stage.previous_masks:
            assert stage.done_before is not None
            before = read_json(stage.done_before)["metrics"][RECOVERED]
        else:
            before = session.evaluate(engine)
        say(f"\n{stage.name}: before pruning {shown(before)}")
        scorer = ScoreAccumulator(self.matrices, self.weights, masks=self.previous, score=spec.score)
        if spec.score != "magnitude":
            name = f"{stage.name}, scores"
            engine.module.train()
            run = Run(
                name=name,
                engine=engine,
                training=training,
                batches=session.batches(name),
                task_loss=session.info.loss,
                checkpoints=stage.folder,
                saves=False,
                unit="rows",
                at=self.at,
            )
            gather_scores(scorer, self.matrices, run)
        engine.close()
        assert stage.sparsity is not None
        masks = make_masks(scorer.scores(), self.matrices, spec, sparsity=stage.sparsity, previous=self.previous)
        return before, masks

    def _record(self, metrics: Mapping[str, Metrics], masks: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        stage, spec, task = self.stage, self.spec, self.session.info.name
        table = sparsity_table(self.matrices, masks, self.previous, quirks=spec.quirks)
        title = f"{task}, {spec.name}, {stage.sparsity:g}%"
        results = {f"{title}, {when}": values for when, values in metrics.items()}
        write_results(stage.folder / "eval_results.txt", results)
        return {
            "task": task,
            "pattern": spec.name,
            "asked_sparsity": stage.sparsity,
            # The original reports the stage's own reduction as the total one.
            "sparsity": table.of_stage if spec.quirks.total_of_stage else table.total,
            "sparsity_of_stage": table.of_stage,
            "matrices": [
                {name: getattr(row, name) for name in ("path", "role", "layer", "kept", "total", "sparsity")}
                for row in table.rows
            ],
            "metrics": metrics,
            "masks": {str(stage.masks): sha256(stage.masks)},
        }


def open_dense_session(stage: TaskStage) -> Session:
    """Reads the fine-tuned model of the first stage of pruning, and the data.

    Raises:
        UserError: there is no such model, or it has no trained head for the task.
    """
    if stage.done_before and not stage.done_before.is_file():
        raise UserError(
            f"{stage.done_before.parent}: there is no fine-tuned model to prune",
            remedy="run the mode pretrain first, or set a fine-tuned model with --finetuned",
        )
    session = open_session(stage.config, stage.source)
    if session.encoder.fresh:
        raise UserError(
            f"{stage.source}: the model has no trained head for {session.info.name}",
            got="; ".join(session.encoder.notes) or f"no {session.encoder.fresh[0]}",
            remedy="fine-tune it first (mode pretrain), or set a fine-tuned one with --finetuned",
        )
    return session


def open_session(config: TaskConfig, source: str) -> Session:
    """Reads the model and the data; nothing is written.

    Raises:
        UserError: something is missing or does not fit.
    """
    world = distributed.world_size()
    info, training = task_info(config), config.training(1)
    check_settings(training, config.deepspeed_config(), world_size=world)
    if config.train_batch_size % (world * training.rows_at_once(world)):
        raise UserError(
            "the batch size does not divide evenly among the devices",
            wanted=f"a multiple of {world} devices × {training.rows_at_once(world)} rows",
            got=f"--train_batch_size {config.train_batch_size}",
        )
    encoder = open_encoder(source, info.head, info.labels, derived_seed(config.seed, "head"), words=info.words)
    limit = encoder.max_length
    if limit is not None and config.max_length > limit:
        raise UserError(
            "--max_length is larger than the model's context", wanted=f"at most {limit}", got=config.max_length
        )
    if encoder.tokenizer.pad_token_id is None:
        raise UserError(f"{source}: its tokenizer has no padding token", wanted="a pad_token")
    data = load_task(config, encoder.tokenizer)
    for rows in (data.train, *(evaluation.rows for evaluation in data.evaluations)):
        for what, largest, size in (
            ("token ids", rows.largest_id, encoder.config.vocab_size),
            ("token types", rows.largest_segment, getattr(encoder.config, "type_vocab_size", 0)),
        ):
            if size and largest >= size:
                raise UserError(
                    f"{source}: its tokenizer gives {what} that the model lacks",
                    wanted=f"at most {size - 1}",
                    got=largest,
                    remedy="use the tokenizer that the model was trained with",
                )
    return Session(config=config, info=info, data=data, encoder=encoder)


def pruned_matrices(encoder: Encoder) -> tuple[PrunedMatrix, ...]:
    """The matrices of an encoder that a pattern prunes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.weights.items()}
    config = encoder.config.to_dict()
    names_differ = not any(path.endswith("attention.self.query.weight") for path in shapes)
    if names_differ and knows(config):
        adapter = by_config(config)
        native, _ = adapter.read(config, {})
        return matrices_of(adapter.space(native))
    return encoder_matrices(shapes, head_size=encoder.config.hidden_size // encoder.config.num_attention_heads)


def shown(metrics: Metrics) -> str:
    """Metrics for messages."""
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
