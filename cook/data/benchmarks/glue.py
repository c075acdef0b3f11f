"""The nine GLUE tasks as they are distributed: which files, which columns, which labels.

Source of the layouts: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
Understanding" (2019), and the archives that its site distributes. Their peculiarities: CoLA has no header; MRPC begins
with a byte order mark; quotes are plain characters everywhere; QQP has a few truncated rows, which every reader leaves
out; MNLI's rows have as many labels as the split had annotators.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cook.base.errors import UserError
from cook.data.reports import LeftOut
from cook.data.source_files import lines_of, opened


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """The columns of a task's texts and labels."""

    name: str  # as in the benchmark's table; also the name of its folder as distributed
    labels: tuple[str, ...] | None = ("0", "1")  # in the order of their ids; None for regression
    words: tuple[str, ...] | None = None  # what published models call the labels, where the files have numbers
    texts: tuple[str, ...] = ("sentence1", "sentence2")  # columns of the first and, for pairs, the second text
    label: str = "label"  # column of the label
    columns: tuple[str, ...] | None = None  # of a file without a header; None: the first line names them
    evaluated: Mapping[str, str] | None = None
    """Files to evaluate on, by the suffix of their metrics; None: `dev.tsv` alone."""
    leaves_out_short_rows: bool = False  # rows with too few columns are part of the distribution


_ENTAILED = ("entailment", "not_entailment")
GLUE_TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            name="CoLA",
            words=("unacceptable", "acceptable"),
            texts=("sentence",),
            columns=("source", "label", "star", "sentence"),
        ),
        GlueTask(name="SST-2", words=("negative", "positive"), texts=("sentence",)),
        GlueTask(
            name="MRPC", words=("not_equivalent", "equivalent"), texts=("#1 String", "#2 String"), label="Quality"
        ),
        GlueTask(name="STS-B", labels=None, label="score"),
        GlueTask(
            name="QQP",
            words=("not_duplicate", "duplicate"),
            texts=("question1", "question2"),
            label="is_duplicate",
            leaves_out_short_rows=True,
        ),
        GlueTask(
            name="MNLI",
            labels=("contradiction", "entailment", "neutral"),
            label="gold_label",
            evaluated={"": "dev_matched.tsv", "-mm": "dev_mismatched.tsv"},
        ),
        GlueTask(name="QNLI", labels=_ENTAILED, texts=("question", "sentence")),
        GlueTask(name="RTE", labels=_ENTAILED),
        GlueTask(name="WNLI", words=("not_entailment", "entailment")),
    )
}
NO_GOLD_LABEL = "-"
"""MNLI's mark for a row on which its annotators did not agree; such rows are not used."""


@dataclass(frozen=True, kw_only=True)
class GlueRow:
    """One example."""

    first: str
    second: str | None
    target: float  # the label's id, or the score of a regression


class GlueRows(NamedTuple):
    """The rows of a file, and those that the distribution itself truncates or leaves undecided."""

    rows: tuple[GlueRow, ...]
    left_out: LeftOut


def glue_task(name: str) -> GlueTask:
    """The task of this name; case and dashes do not matter (`sst2`, `STS-B`)."""
    wanted = name.lower().replace("-", "").replace("_", "")
    for task in GLUE_TASKS.values():
        if task.name.lower().replace("-", "") == wanted:
            return task
    raise UserError(f"unknown GLUE task {name!r}", wanted=", ".join(GLUE_TASKS))


def read_glue(task: GlueTask, path: Path) -> GlueRows:
    """Reads a file of a task; a `UserError` with file and line if it is missing or malformed."""
    lines = _lines(path)
    try:
        columns = list(task.columns or next(lines)[1])
    except StopIteration:
        raise UserError(f"{path}: the file is empty") from None
    places = [_place(columns, name, path) for name in (*task.texts, task.label)]
    rows, left_out = [], LeftOut()
    for number, cells in lines:
        if len(cells) < len(columns) and task.leaves_out_short_rows:
            left_out.add("rows that the distribution has cut short", 1, f"line {number}")
            continue
        if len(cells) != len(columns):
            raise UserError(
                f"{path}, line {number}: not a row of {task.name}",
                wanted=f"{len(columns)} columns, separated by tabs",
                got=f"{len(cells)}: {_shortened(cells)}",
                remedy="correct or remove the line, or download the file again",
            )
        *texts, label = (cells[place] for place in places)
        if label == NO_GOLD_LABEL:
            left_out.add("rows without a gold label", 1, f"line {number}")
            continue
        target = _target(task, label, path, number)
        rows.append(GlueRow(first=texts[0], second=texts[1] if len(texts) > 1 else None, target=target))
    if not rows:
        raise UserError(f"{path}: holds no row of {task.name}")
    return GlueRows(rows=tuple(rows), left_out=left_out)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells. Only a line feed ends a line: the texts hold other separators of Unicode."""
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file",
            remedy="fetch the data with `python scripts/download_glue_data.py`, or name its folder with --data_dir",
        )
    with opened(path) as file:
        for number, (_, line) in enumerate(lines_of(file, path), start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 at byte {error.start} of the line") from None
            yield number, text.rstrip("\r\n").split("\t")


def _place(columns: list[str], name: str, path: Path) -> int:
    if name not in columns:
        raise UserError(f"{path}, line 1: no column {name!r}", got=", ".join(columns) or "an empty line")
    return columns.index(name)


def _target(task: GlueTask, label: str, path: Path, number: int) -> float:
    if task.labels:
        if label not in task.labels:
            raise UserError(f"{path}, line {number}: unknown label", wanted=", ".join(task.labels), got=repr(label))
        return float(task.labels.index(label))
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not 0.0 <= score <= 5.0:
        raise UserError(f"{path}, line {number}: not a score", wanted="a number from 0 to 5", got=repr(label))
    return score


def _shortened(cells: list[str]) -> str:
    text = repr("\t".join(cells))
    return text if len(text) <= 100 else text[:100] + "…"
