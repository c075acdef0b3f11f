"""What fine-tuning and pattern pruning on GLUE and SQuAD are told: one frozen dataclass, and the options made from it.

The dataclass is the only description: its fields are the command's options, its docstrings their help.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cook.base.errors import UserError, UserErrors
from cook.base.files import read_json
from cook.config.types import Precision, TrainingConfig

TaskMode = Literal["pretrain", "prune", "export"]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A run on a task."""

    mode: TaskMode
    """pretrain: fine-tune the dense model on the task; prune: score, mask, recover, stage by stage; export: write the
    compact model"""

    task_name: str
    """CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI, SQuAD1.1 or SQuAD2.0"""

    data_dir: str = "data/glue"
    """folder of the tasks' folders, or for SQuAD of its JSON files"""

    model: str = ""
    """pretrain: what to fine-tune: a Hugging Face folder or Hub name, or a folder as Google distributed BERT"""

    output_dir: str = ""
    """folder of all outputs; default: results/tasks/TASK"""

    finetuned: str = ""
    """the dense model to prune; default: what `pretrain` left in the output folder"""

    pruning_type: str = "8"
    """0 to 8, or a pattern's name, such as tile_wise_k, unstructured, m4n2_1d"""

    granularity: int = 128
    """G, columns of a tile"""

    block: int = 32
    """B, side of a block (type 5)"""

    vector: int = 16
    """inputs of a vector (type 4)"""

    score: str = "taylor_w2"
    """importance of a weight: taylor_w2, taylor or magnitude"""

    quirks: str = ""
    """historical behaviours to repeat: `historical` for all, or names separated by commas"""

    sparsities: tuple[float, ...] = (50.0,)
    """percent after each stage, rising"""

    scoring_steps: int = 100
    """batches that a stage's scores are taken over"""

    epochs: float = 3.0
    """passes over the training data: of the fine-tuning, or of each stage's recovery"""

    train_batch_size: int = 32
    """rows a step, over all devices"""

    micro_batch_size: int = 32
    """rows that one device holds at a time, at most"""

    eval_batch_size: int = 64
    """rows of a batch in evaluations"""

    learning_rate: float = 2e-5
    """peak, reached after the warm-up, falling linearly to 0"""

    warmup: float = 0.1
    """fraction of the steps in which the rate rises"""

    weight_decay: float = 0.01
    """AdamW's, on matrices only"""

    clip: float = 1.0
    """largest norm of the gradient"""

    max_length: int = 128
    """tokens of a row at most"""

    doc_stride: int = 128
    """SQuAD: tokens between the starts of two windows on a long document"""

    max_query_length: int = 64
    """SQuAD: tokens of a question at most"""

    n_best: int = 20
    """SQuAD: length of the n-best lists"""

    max_answer_length: int = 30
    """SQuAD: tokens of an answer at most"""

    null_threshold: float = 0.0
    """SQuAD2.0: no answer is given where it scores higher than the best answer by more than this"""

    distillation: float = 0.0
    """GLUE: weight of the divergence from the dense model's predictions in recoveries; 0: off"""

    temperature: float = 2.0
    """softens both predictions in the distillation"""

    precision: Precision = "auto"
    """auto (bf16 where the device has it), fp32, bf16 or fp16"""

    deepspeed: str = ""
    """file with a DeepSpeed config; default: ZeRO 0 on one device, 2 on several"""

    save_every: int = 0
    """steps between checkpoints; 0: at the end of a training only"""

    log_every: int = 10
    """steps between log lines"""

    tensorboard: bool = True
    """true or false: scalars for TensorBoard"""

    threads: int = 0
    """CPU threads a process; 0: the machine's, shared out"""

    rank_timeout: float = 300.0
    """seconds after which a silent device or an unfinished step ends the run; ten times as many for a
    first step or a save; 0: never"""

    seed: int = 42
    """of fresh weights, data order and dropout"""

    resume: str = "auto"
    """auto: skip what is finished and go on from checkpoints; never: do it all again"""

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
    parser = argparse.ArgumentParser(
        prog="cook/tasks.py",
        allow_abbrev=False,
        description=("Fine-tunes, prunes and exports an encoder on a GLUE task or SQuAD."),
    )
    parser.add_argument("mode", choices=get_args(TaskMode), help=_helps()["mode"])
    fields = [field for field in dataclasses.fields(TaskConfig) if field.name != "mode"]
    for field in fields:
        default = "" if field.default in ("", dataclasses.MISSING) else f" (default: {_shown(field.default)})"
        parser.add_argument(
            f"--{field.name}",
            metavar=field.name.upper().split("_")[-1],
            help=_helps()[field.name] + default,
            required=field.default is dataclasses.MISSING,
        )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    given = vars(parser.parse_args(arguments))
    values: dict[str, Any] = {"mode": given["mode"]}
    errors: list[UserError] = []
    for field in fields:
        text = given[field.name]
        if text is not None:
            try:
                values[field.name] = _parsed(field, text)
            except UserError as error:
                errors.append(error)
    config = TaskConfig(**values)
    errors += _mistakes(config)
    if errors:
        raise UserErrors("options", errors)
    return config


def _helps() -> dict[str, str]:
    """The fields' docstrings, by name."""
    body = ast.parse(inspect.getsource(TaskConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _shown(value: Any) -> str:
    return " ".join(f"{item:g}" for item in value) if isinstance(value, tuple) else str(value).replace("%", "%%")


def _parsed(field: dataclasses.Field, text: str) -> Any:
    kind = str(field.type)
    try:
        if kind.startswith("tuple"):
            return tuple(float(part) for part in text.replace(",", " ").split())
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        return {"int": int, "float": float}.get(kind, str)(text)
    except (ValueError, KeyError):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(kind, "numbers")
        raise UserError(f"--{field.name}: not a usable value", wanted=wanted, got=repr(text)) from None


_LEAST = {
    "granularity": 1,
    "block": 1,
    "vector": 1,
    "scoring_steps": 1,
    "train_batch_size": 1,
    "micro_batch_size": 1,
    "log_every": 1,
    "eval_batch_size": 1,
    "max_length": 4,
    "doc_stride": 1,
    "max_query_length": 1,
    "n_best": 1,
    "max_answer_length": 1,
    "save_every": 0,
    "threads": 0,
    "rank_timeout": 0,
    "seed": 0,
    "weight_decay": 0,
    "clip": 0,
    "warmup": 0,
    "distillation": 0,
}
_POSITIVE = ("epochs", "learning_rate", "temperature")


def _mistakes(config: TaskConfig) -> list[UserError]:
    found = []
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if not value >= least or value == float("inf"):
            found.append(UserError(f"--{name}: out of range", wanted=f"at least {least}", got=value))
    for name in _POSITIVE:
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            found.append(UserError(f"--{name}: out of range", wanted="a number above 0", got=value))
    if config.warmup > 1:
        found.append(UserError("--warmup: out of range", wanted="a fraction of 1", got=config.warmup))
    for name, kind in (("precision", Precision), ("resume", Literal["auto", "never"])):
        if getattr(config, name) not in get_args(kind):
            wanted = ", ".join(get_args(kind))
            found.append(UserError(f"--{name}: unknown value", wanted=wanted, got=repr(getattr(config, name))))
    if config.mode == "pretrain" and not config.model:
        found.append(UserError("--model: pretrain needs a model to fine-tune", wanted="a folder or a Hub name"))
    if config.distillation and config.is_squad:
        found.append(UserError("--distillation: for GLUE tasks only", got=f"--task_name {config.task_name}"))
    return found


def settings_fingerprint(config: TaskConfig, names: tuple[str, ...]) -> str:
    """The values that an outcome depends on, as one text."""
    return json.dumps({name: getattr(config, name) for name in names}, sort_keys=True)
