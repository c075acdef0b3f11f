"""Fine-tuning a dense model on a task, and pruning it stage by stage: score, mask, evaluate, recover, evaluate."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cook.base import distributed
from cook.base.distributed import say
from cook.base.errors import UserError
from cook.base.files import read_json, sha256, write_json
from cook.base.seeds import derived_seed
from cook.base.tensor_files import open_safetensors_folder
from cook.base.together import on_first_rank
from cook.base.watchdog import At
from cook.config.tasks import TaskConfig, settings_fingerprint
from cook.families.encoder import Encoder, open_encoder
from cook.recipe.benchmarks import task_plan as plan
from cook.recipe.benchmarks.session import (
    DONE,
    Session,
    finished,
    identity_of,
    weights_identity,
    write_results,
)
from cook.recipe.benchmarks.task import load_task, task_info
from cook.recipe.benchmarks.task_report import write_prune_report
from cook.sparsity.matrices import PrunedMatrix, encoder_matrices
from cook.sparsity.pattern_file import read_pattern_masks, write_pattern_masks
from cook.sparsity.pattern_masks import SparsityTable, apply_masks, make_masks, sparsity_table
from cook.sparsity.scores import ScoreAccumulator
from cook.sparsity.spec import PatternSpec
from cook.training.settings import check_settings

Weights = Mapping[str, torch.Tensor]
MASKS = "masks.safetensors"
BEFORE, PRUNED, RECOVERED = "before pruning", "after pruning", "after recovery"


def open_session(config: TaskConfig, source: str, at: At = lambda _step, _phase: None) -> Session:
    """Reads the model and the data; nothing is written.

    Raises:
        UserError: something is missing or does not fit.
    """
    world = distributed.world_size()
    info, training = task_info(config), config.training(1)
    check_settings(training, config.deepspeed_config(), world_size=world)
    if config.train_batch_size % (world * training.rows_at_once(world)):
        raise UserError(
            "the batch does not divide among the devices",
            wanted=f"a multiple of {world} devices × {training.rows_at_once(world)} rows",
            got=f"--train_batch_size {config.train_batch_size}",
        )
    encoder = open_encoder(source, info.head, info.labels, derived_seed(config.seed, "head"), words=info.words)
    limit = encoder.max_length
    if limit is not None and config.max_length > limit:
        raise UserError("--max_length is more than the model reads", wanted=f"at most {limit}", got=config.max_length)
    if encoder.tokenizer.pad_token_id is None:
        raise UserError(f"{source}: its tokenizer has no token that fills a batch", wanted="a pad_token")
    data = load_task(config, encoder.tokenizer)
    for rows in (data.train, *(examination.rows for examination in data.examinations)):
        for what, largest, size in (
            ("token ids", rows.largest_id, encoder.config.vocab_size),
            ("token types", rows.largest_segment, getattr(encoder.config, "type_vocab_size", 0)),
        ):
            if size and largest >= size:
                raise UserError(
                    f"{source}: its tokenizer gives {what} that the model does not have",
                    wanted=f"at most {size - 1}",
                    got=largest,
                    remedy="use the tokenizer that the model was trained with",
                )
    for note in (*encoder.notes, *data.notes):
        say(note)
    at(0, "starting")
    return Session(config=config, info=info, data=data, encoder=encoder, at=at)


def run_pretrain(config: TaskConfig, at: At) -> None:
    """Fine-tunes the dense model."""
    folder = plan.pretrain_folder(config)
    session = open_session(config, config.model, at)
    settings = settings_fingerprint(config, plan.DATA_SETTINGS + plan.FIT_SETTINGS)
    identity = identity_of(settings, session.data.train.fingerprint, weights_identity(session.encoder.weights))
    if finished(folder, identity, config.resume):
        say(f"pretrain: already finished, see {folder / DONE}")
        return
    _start_over(folder, config)
    if session.encoder.fresh:
        say(f"pretrain: {config.model} has no head for {session.info.name}: a fresh one is trained")
    started = time.perf_counter()
    training = config.training(session.steps)
    engine = session.engine(session.encoder.weights, training, "pretrain")
    say(_opening("pretrain", session, training.steps, engine))
    session.fit(engine, training, folder, "pretrain", identity=identity)
    metrics = session.evaluate(engine, folder)
    session.log(folder, {"fine-tuned": metrics})
    session.save(engine, folder / "model")
    engine.close()
    say(f"pretrain: {_shown(metrics)}")
    record = {
        "identity": identity,
        "task": session.info.name,
        "metrics": metrics,
        "steps": training.steps,
        "seconds": round(time.perf_counter() - started, 1),
    }
    results = {f"{session.info.name}, dense": metrics}
    on_first_rank(lambda: write_results(folder / "eval_results.txt", results))
    on_first_rank(lambda: _finish(folder, record))


def run_prune(config: TaskConfig, at: At) -> None:
    """Prunes the fine-tuned model, each stage from the weights and masks of the one before it."""
    stages, spec = plan.prune_stages(config), plan.pattern_spec(config)
    source = dense_folder(config)
    session = open_session(config, source, at)
    if session.encoder.fresh:
        raise UserError(
            f"{source}: the model has no trained head for {session.info.name}",
            got="; ".join(session.encoder.notes) or f"no {session.encoder.fresh[0]}",
            remedy="fine-tune it first (mode pretrain), or name a fine-tuned one with --finetuned",
        )
    matrices = pruned_matrices(session.encoder)
    # A size that does not divide is a mistake to tell before anything is written.
    make_masks({m.path: torch.ones(m.shape) for m in matrices}, matrices, spec, sparsity=0.0)
    weights: Weights = session.encoder.weights
    follows = weights_identity(weights)
    masks: Weights | None = None
    known: Mapping[str, float] | None = None
    settings = settings_fingerprint(config, plan.DATA_SETTINGS + plan.FIT_SETTINGS + plan.PRUNE_SETTINGS)
    for stage in stages:
        identity = identity_of(settings, repr(spec), stage.sparsity, session.data.train.fingerprint, follows)
        done = finished(stage.folder, identity, config.resume)
        if done:
            say(f"{stage.name}: already finished, see {stage.folder / DONE}")
            if sha256(stage.folder / MASKS) != done["masks"]:
                raise UserError(
                    f"{stage.folder / MASKS}: not the masks that the stage finished with",
                    remedy="restore the file, or do it again with --resume never",
                )
            masks, _ = read_pattern_masks(stage.folder / MASKS, matrices)
            weights = dict(open_safetensors_folder(stage.folder / "model").items())
        else:
            _start_over(stage.folder, config)
            weights, masks = _prune_stage(session, spec, matrices, stage, weights, masks, identity, known)
        follows, known = identity, read_json(stage.folder / DONE)["metrics"][RECOVERED]
        on_first_rank(lambda: write_prune_report(config, session.info, spec, source))


def dense_folder(config: TaskConfig) -> str:
    """The fine-tuned model that is pruned.

    Raises:
        UserError: there is none.
    """
    if config.finetuned:
        return config.finetuned
    folder = plan.pretrain_folder(config)
    if not (folder / DONE).is_file():
        raise UserError(
            f"{folder}: there is no fine-tuned model to prune",
            remedy="run the mode pretrain first, or name a fine-tuned model with --finetuned",
        )
    return str(folder / "model")


def pruned_matrices(encoder: Encoder) -> tuple[PrunedMatrix, ...]:
    """The matrices of an encoder that patterns prune."""
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.weights.items()}
    return encoder_matrices(shapes, head_size=encoder.config.hidden_size // encoder.config.num_attention_heads)


def _prune_stage(
    session: Session,
    spec: PatternSpec,
    matrices: tuple[PrunedMatrix, ...],
    stage: plan.PruneStage,
    weights: Weights,
    previous: Weights | None,
    identity: str,
    known: Mapping[str, float] | None,
) -> tuple[Weights, Weights]:
    """One stage; returns the weights and masks that it ends with. `known`: its metrics before pruning, if they are."""
    config, started = session.config, time.perf_counter()
    name = f"{spec.name} {stage.name}"
    scored = stage.folder / "scored.json"
    record = read_json(scored) if scored.is_file() else {}
    if record.get("identity") != identity:
        before, masks = _score(session, spec, matrices, stage, weights, previous, name, known)
        record = {"identity": identity, "metrics": before}
        pattern = {"pattern": spec.name, "sparsity": stage.sparsity, "spec": dataclasses.asdict(spec)}
        on_first_rank(lambda: write_pattern_masks(stage.folder / MASKS, masks, pattern))
        on_first_rank(lambda: write_json(scored, record))
    masks, _ = read_pattern_masks(stage.folder / MASKS, matrices)
    table = sparsity_table(matrices, masks, previous, quirks=spec.quirks)
    metrics = {BEFORE: record["metrics"]}

    training = config.training(session.steps)
    masked = {path: tensor.clone() for path, tensor in weights.items()}
    apply_masks(masked, masks)
    engine = session.engine(masked, training, "recovery", stage.sparsity)
    engine.hold_zeros(masks, gradients_only=spec.quirks.drifting_weights)
    metrics[PRUNED] = session.evaluate(engine)
    say(f"{name}: after pruning {_shown(metrics[PRUNED])}")
    say(_opening(name, session, training.steps, engine))
    # The original went on counting from the scoring steps, so that its rate was 0 early.
    skipped = min(config.scoring_steps, training.steps) if spec.quirks.schedule_goes_on else 0
    session.fit(
        engine,
        training,
        stage.folder,
        name,
        identity=identity,
        start_step=skipped,
        imitates=True,
    )
    metrics[RECOVERED] = session.evaluate(engine, stage.folder)
    session.log(stage.folder, metrics)
    recovered = session.save(engine, stage.folder / "model")
    engine.close()
    say(f"{name}: after recovery {_shown(metrics[RECOVERED])}")
    seconds = time.perf_counter() - started
    on_first_rank(lambda: _write_stage(session, spec, stage, identity, metrics, table, seconds))
    return recovered, masks


def _score(
    session: Session,
    spec: PatternSpec,
    matrices: tuple[PrunedMatrix, ...],
    stage: plan.PruneStage,
    weights: Weights,
    previous: Weights | None,
    name: str,
    known: Mapping[str, float] | None,
) -> tuple[Mapping[str, float], dict[str, torch.Tensor]]:
    """The metrics before pruning, and the masks from gradients over the scoring steps, the weights frozen."""
    training = session.config.training(session.config.scoring_steps, frozen=True)
    engine = session.engine(weights, training, "scores", stage.sparsity)
    before = known or session.evaluate(engine)
    say(f"\n{name}: before pruning {_shown(before)}")
    scorer = ScoreAccumulator(matrices, weights, masks=previous, score=spec.score)
    if spec.score != "magnitude":
        paths = [matrix.path for matrix in matrices]
        engine.on_gradients = lambda: scorer.add(engine.full_gradients(paths))
        session.fit(engine, training, stage.folder, f"{name}, scores", identity="", keeps=False)
    engine.close()
    return before, make_masks(scorer.scores(), matrices, spec, sparsity=stage.sparsity, previous=previous)


def _write_stage(
    session: Session,
    spec: PatternSpec,
    stage: plan.PruneStage,
    identity: str,
    metrics: Mapping[str, Mapping[str, float]],
    table: SparsityTable,
    seconds: float,
) -> None:
    title = f"{session.info.name}, {spec.name}, {stage.name}"
    write_results(stage.folder / "eval_results.txt", {f"{title}, {when}": values for when, values in metrics.items()})
    # The original told the stage's own reduction as the total one.
    total = table.of_stage if spec.quirks.total_of_stage else table.total
    _finish(
        stage.folder,
        {
            "identity": identity,
            "task": session.info.name,
            "pattern": spec.name,
            "asked_sparsity": stage.sparsity,
            "sparsity": total,
            "sparsity_of_stage": table.of_stage,
            "matrices": [
                {
                    "path": row.path,
                    "role": row.role,
                    "layer": row.layer,
                    "kept": row.kept,
                    "total": row.total,
                    "sparsity": row.sparsity,
                }
                for row in table.rows
            ],
            "metrics": metrics,
            "seconds": round(seconds, 1),
            "masks": sha256(stage.folder / MASKS),
        },
    )


def _finish(folder: Path, record: dict[str, Any]) -> None:
    write_json(folder / DONE, record)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the model is whole: nothing will go on from them


def _start_over(folder: Path, config: TaskConfig) -> None:
    if config.resume == "never" and distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    distributed.barrier()


def _opening(name: str, session: Session, steps: int, engine: Any) -> str:
    config = session.config
    return (
        f"\n{name}: {len(session.data.train)} rows, {steps} steps × {config.train_batch_size} rows; "
        f"{engine.precision}, ZeRO {engine.zero_stage}, {distributed.world_size()} rank(s) on {engine.device.type}"
    )


def _shown(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
