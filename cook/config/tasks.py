"""The settings of fine-tuning and pattern pruning on GLUE and SQuAD, and the command-line options made from them.

The dataclass is the only description: `python -m cook.config` makes the schema from it, in which the command finds its
options, their help and their limits.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cook.base.errors import UserError, UserErrors
from cook.base.files import read_json
from cook.config.declare import Count, Fraction, Limits, Scale, Size, UserPath
from cook.config.schema import load_schema, schema_findings
from cook.config.scheme import PatternScore
from cook.config.types import Precision, TrainingConfig

TaskMode = Literal["pretrain", "prune", "export"]
Positive = Annotated[float, Limits(exclusiveMinimum=0, maximum=10**6)]
Sparsities = Annotated[tuple[float, ...], Limits(title="numbers, separated by spaces or commas")]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A run on a task."""

    mode: TaskMode
    """`pretrain`: fine-tune the dense model on the task; `prune`: score, mask, recover, stage by stage; `export`: write
    the compact model."""

    task_name: str
    """CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI, SQuAD1.1 or SQuAD2.0."""

    data_dir: UserPath = "data/glue"
    """Folder of the tasks' folders, or for SQuAD of its JSON files."""

    model: str = ""
    """What `pretrain` fine-tunes: a Hugging Face folder or Hub name, or a folder as Google distributed BERT."""

    output_dir: UserPath = ""
    """Folder of all outputs; default: results/tasks/TASK."""

    finetuned: UserPath = ""
    """The dense model to prune; default: what `pretrain` left in the output folder."""

    pruning_type: str = "8"
    """0 to 8, or a pattern's name, such as tile_wise_k, unstructured, m4n2_1d."""

    granularity: Size = 128
    """G, columns of a tile."""

    block: Size = 32
    """B, side of a block (type 5)."""

    vector: Size = 16
    """Inputs of a vector (type 4)."""

    score: PatternScore = "taylor_w2"
    """Importance of a weight: taylor_w2, taylor or magnitude."""

    quirks: str = ""
    """Historical behaviours to repeat: `historical` for all, or names separated by commas."""

    sparsities: Sparsities = (50.0,)
    """Percent after each stage, rising."""

    scoring_steps: Size = 100
    """Batches that a stage's scores are taken over."""

    epochs: Positive = 3.0
    """Passes over the training data: of the fine-tuning, or of each stage's recovery."""

    train_batch_size: Size = 32
    """Rows a step, over all devices."""

    micro_batch_size: Size = 32
    """Rows that one device holds at a time, at most."""

    eval_batch_size: Size = 64
    """Rows of a batch in evaluations."""

    learning_rate: Positive = 2e-5
    """Peak, reached after the warm-up, falling linearly to 0."""

    warmup: Fraction = 0.1
    """Fraction of the steps in which the rate rises."""

    weight_decay: Fraction = 0.01
    """AdamW's, on matrices only."""

    clip: Scale = 1.0
    """Largest norm of the gradient."""

    max_length: Annotated[int, Limits(minimum=4, maximum=10**9)] = 128
    """Tokens of a row at most."""

    doc_stride: Size = 128
    """SQuAD: tokens between the starts of two windows on a long document."""

    max_query_length: Size = 64
    """SQuAD: tokens of a question at most."""

    n_best: Size = 20
    """SQuAD: length of the n-best lists."""

    max_answer_length: Size = 30
    """SQuAD: tokens of an answer at most."""

    null_threshold: float = 0.0
    """SQuAD2.0: no answer is given where it scores higher than the best answer by more than this."""

    distillation: Scale = 0.0
    """GLUE: weight of the divergence from the dense model's predictions in recoveries; 0: off."""

    temperature: Positive = 2.0
    """Softens both predictions in the distillation."""

    precision: Precision = "auto"
    """Auto (bf16 where the device has it), fp32, bf16 or fp16."""

    deepspeed: UserPath = ""
    """File with a DeepSpeed config; default: ZeRO 0 on one device, 2 on several."""

    save_every: Count = 0
    """Steps between checkpoints; 0: at the end of a training only."""

    log_every: Size = 10
    """Steps between log lines."""

    tensorboard: bool = True
    """True or false: scalars for TensorBoard."""

    threads: Count = 0
    """CPU threads a process; 0: the machine's, shared out."""

    rank_timeout: Scale = 300.0
    """Seconds after which a silent device or an unfinished step ends the run; ten times as many for a first step or a
    save; 0: never."""

    seed: Count = 42
    """Of fresh weights, data order and dropout."""

    resume: Literal["auto", "never"] = "auto"
    """Auto: skip what is finished and go on from checkpoints; never: do it all again."""

    @property
    def is_squad(self) -> bool:
        return self.task_name.lower().startswith("squad")

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.output_dir or f"results/tasks/{self.task_name}")

    def steps(self, rows: int) -> int:
        """Optimizer steps of the epochs over so many rows; the last batch is filled up with the next epoch's first."""
        return max(1, math.ceil(self.epochs * rows / self.train_batch_size))

    def training(self, steps: int, *, frozen: bool = False) -> TrainingConfig:
        """The training section of one of the run's trainings.

        Args:
            steps: Optimizer steps.
            frozen: True: weights stay exactly as they are, for scores.
        """
        return TrainingConfig(
            steps=steps,
            train_batch_size=self.train_batch_size,
            micro_batch_size=self.micro_batch_size,
            learning_rate=0.0 if frozen else self.learning_rate,
            warmup=self.warmup,
            schedule="linear",
            min_learning_rate=0.0,
            weight_decay=0.0 if frozen else self.weight_decay,
            clip=self.clip,
            precision=self.precision,
            log_every=self.log_every,
            save_every=self.save_every,
            keep_checkpoints=1,
            threads=self.threads or None,
            rank_timeout=self.rank_timeout,
        )

    def deepspeed_config(self) -> dict[str, Any]:
        """The DeepSpeed config, its "auto" values not yet filled in."""
        if not self.deepspeed:
            return {}
        content = read_json(self.deepspeed)
        if not isinstance(content, dict):
            raise UserError(f"{self.deepspeed}: not a DeepSpeed config", wanted="a JSON object")
        return content


def parse_task_options(arguments: list[str] | None = None) -> TaskConfig:
    """The config from a command line; all mistakes in it at once.

    Raises:
        UserErrors: values that cannot be.
    """
    options = load_schema("tasks")["properties"]
    parser = argparse.ArgumentParser(
        prog="cook/tasks.py",
        allow_abbrev=False,
        description=("Fine-tunes, prunes and exports an encoder on a GLUE task or SQuAD."),
    )
    parser.add_argument("mode", choices=get_args(TaskMode), help=options["mode"]["description"])
    for name, node in options.items():
        if name != "mode":
            shown = _written(node.get("default", ""))
            text = node["description"] + (f" (default: {shown})" if shown else "")
            needed = "default" not in node
            parser.add_argument(f"--{name}", metavar=name.upper().split("_")[-1], help=text, required=needed)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    given = vars(parser.parse_args(arguments))
    values = {name: _parsed(node, given[name]) for name, node in options.items() if given[name] is not None}
    findings = schema_findings(values, "tasks", "options")
    invalid = {finding.section: finding.error.wanted for finding in findings}
    errors = [
        UserError(f"--{name}: not a usable value", wanted=wanted, got=repr(given[name]))
        for name, wanted in invalid.items()
    ]
    sound = {name: value for name, value in values.items() if name not in invalid}
    config = TaskConfig(**sound | {"sparsities": tuple(sound["sparsities"])} if "sparsities" in sound else sound)
    if config.mode == "pretrain" and not config.model:
        errors.append(UserError("--model: pretrain needs a model to fine-tune", wanted="a folder or a Hub name"))
    if config.distillation and config.is_squad:
        errors.append(UserError("--distillation: for GLUE tasks only", got=f"--task_name {config.task_name}"))
    if errors:
        raise UserErrors("options", errors)
    return config


def _written(value: Any) -> str:
    """A default as it is given on the command line."""
    return " ".join(f"{item:g}" for item in value) if isinstance(value, list) else str(value).replace("%", "%%")


def _parsed(node: dict[str, Any], text: str) -> Any:
    """A value of the option's type; the text itself where it is none, for the schema to refuse."""
    try:
        if node.get("type") == "array":
            return [float(part) for part in text.replace(",", " ").split()]
        if node.get("type") == "boolean":
            return {"true": True, "false": False}[text.lower()]
        return {"integer": int, "number": float}.get(node.get("type", "string"), str)(text)
    except (ValueError, KeyError):
        return text


def settings_fingerprint(config: TaskConfig, names: tuple[str, ...]) -> str:
    """The values that an outcome depends on, as one text."""
    return json.dumps({name: getattr(config, name) for name in names}, sort_keys=True)
