"""A benchmark task: training rows, evaluation rows with their metrics, the head and the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cook.base.errors import UserError
from cook.config.tasks import TaskConfig
from cook.data.benchmarks.glue import glue_task, read_glue
from cook.data.benchmarks.squad import read_squad, squad_windows
from cook.data.benchmarks.token_rows import TokenRows, glue_rows
from cook.evaluation.metrics import glue_metrics, main_metric, squad_v1_metrics, squad_v2_metrics
from cook.evaluation.squad_answers import AnswerOptions, choose_answers
from cook.families.encoder import Head
from cook.training.optim import TaskLoss, class_loss, score_loss, span_loss

Outputs = Sequence[tuple[np.ndarray, ...]]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of a model's outputs."""

    metrics: dict[str, float]
    """In percent."""
    files: Mapping[str, Any]
    """JSON files to write with the results, by name."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Rows to evaluate on, and how to score the outputs."""

    rows: TokenRows
    score: Callable[[Outputs], Scores]
    """Computes metrics from the rows' outputs."""


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """The properties of a task that are known before its data is read."""

    name: str
    """The name in the benchmark."""
    head: Head
    """What the model predicts."""
    labels: tuple[str, ...]
    """Names of the classes or of the score."""
    words: tuple[str, ...] | None = None
    """Alternative names of the classes."""
    loss: TaskLoss
    """The loss, summed over rows."""
    outputs: tuple[str, ...]
    """The model's outputs that are scored."""
    main_metric: str
    """The main metric of the task."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task's tokenised data."""

    train: TokenRows
    evaluations: tuple[Evaluation, ...]
    notes: tuple[str, ...]
    """Messages about rows that were left out."""


def task_info(config: TaskConfig) -> TaskInfo:
    """The task that a config names.

    Raises:
        UserError: no such task.
    """
    if config.is_squad:
        metric = "f1"
        return TaskInfo(
            name=f"SQuAD{_squad_version(config)}",
            head="span",
            labels=(),
            loss=span_loss,
            outputs=("start_logits", "end_logits"),
            main_metric=metric,
        )
    task = glue_task(config.task_name)
    if config.distillation and task.labels is None:
        raise UserError("--distillation needs a task with classes", got=f"--task_name {task.name}")
    return TaskInfo(
        name=task.name,
        head="classes" if task.labels else "score",
        labels=task.labels or ("score",),
        words=task.words,
        loss=class_loss if task.labels else score_loss,
        outputs=("logits",),
        main_metric=main_metric(task.name),
    )


def load_task(config: TaskConfig, tokenizer: Any) -> TaskData:
    """Reads and tokenises a task's files.

    Raises:
        UserError: a file is missing or malformed; names file and line.
    """
    return _load_squad(config, tokenizer) if config.is_squad else _load_glue(config, tokenizer)


def task_files(config: TaskConfig) -> dict[str, Path]:
    """The files of a task: `train`, and per evaluation the ending of its metrics' names.

    Raises:
        UserError: no such task.
    """
    folder = Path(config.data_dir)
    if config.is_squad:
        version = _squad_version(config)
        return {"train": folder / f"train-v{version}.json", "": folder / f"dev-v{version}.json"}
    task = glue_task(config.task_name)
    evaluated = {suffix: folder / task.name / name for suffix, name in (task.evaluated or {"": "dev.tsv"}).items()}
    return {"train": folder / task.name / "train.tsv"} | evaluated


def _squad_version(config: TaskConfig) -> str:
    version = config.task_name.lower().removeprefix("squad").strip("-_ v")
    if version not in ("1.1", "2.0"):
        raise UserError(f"unknown task {config.task_name!r}", wanted="SQuAD1.1 or SQuAD2.0")
    return version


def _load_glue(config: TaskConfig, tokenizer: Any) -> TaskData:
    task, files = glue_task(config.task_name), task_files(config)
    read = {key: read_glue(task, path) for key, path in files.items()}
    rows = {
        key: glue_rows(task, found.rows, tokenizer, config.max_length, found.left_out) for key, found in read.items()
    }
    notes = [note for key, found in read.items() for note in found.left_out.sentences(str(files[key]))]
    evaluations = tuple(
        Evaluation(rows=rows[suffix], score=partial(_score_glue, task.name, suffix, rows[suffix].targets_R))
        for suffix in files
        if suffix != "train"
    )
    return TaskData(train=rows["train"], evaluations=evaluations, notes=tuple(notes))


def _score_glue(task: str, suffix: str, targets: np.ndarray, outputs: Outputs) -> Scores:
    logits = np.stack([values[0] for values in outputs])
    predictions = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)
    metrics = {f"{name}{suffix}": 100.0 * value for name, value in glue_metrics(task, predictions, targets).items()}
    return Scores(metrics=metrics, files={})


def _load_squad(config: TaskConfig, tokenizer: Any) -> TaskData:
    version, files = _squad_version(config), tuple(task_files(config).values())
    windows_of = partial(
        squad_windows,
        tokenizer=tokenizer,
        max_length=config.max_length,
        doc_stride=config.doc_stride,
        max_query_length=config.max_query_length,
    )
    for path in files:
        if not path.is_file():
            remedy = "download the data with `bash scripts/download_squad_data.sh`, or set its folder with --data_dir"
            raise UserError(f"{path}: there is no such file", remedy=remedy)
    taught = read_squad(files[0], for_training=True)
    train, _ = windows_of(taught.questions, left_out=taught.left_out)
    notes = taught.left_out.sentences(str(files[0]))
    if taught.num_found:
        notes += [f"{files[0]}: {taught.num_found:,} answers are not at their answer_start; found by their text"]
    questions = read_squad(files[1], for_training=False).questions
    rows, windows = windows_of(questions)
    options = AnswerOptions(
        n_best=config.n_best,
        max_answer_length=config.max_answer_length,
        allows_no_answer=version == "2.0",
        null_threshold=config.null_threshold,
    )

    def score(outputs: Outputs) -> Scores:
        starts, ends = [values[0] for values in outputs], [values[1] for values in outputs]
        answers = choose_answers(questions, windows, starts, ends, options)
        written: dict[str, Any] = {"predictions.json": answers.predictions, "nbest_predictions.json": answers.n_best}
        if version == "1.1":
            return Scores(metrics=squad_v1_metrics(questions, answers.predictions), files=written)
        written["null_odds.json"] = answers.null_odds
        threshold = options.null_threshold
        metrics = squad_v2_metrics(questions, answers.best_texts, answers.null_odds, threshold)
        return Scores(metrics=metrics, files=written)

    return TaskData(train=train, evaluations=(Evaluation(rows=rows, score=score),), notes=tuple(notes))
