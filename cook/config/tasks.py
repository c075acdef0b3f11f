"""Settings of the commands without a configuration file: `cook prune`, and pattern pruning on GLUE and SQuAD.

The JSON schema is generated from `TaskConfig`. The command takes its options, help and limits from the schema.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cook.base.errors import UserError, UserErrors
from cook.base.files import read_json
from cook.config.declare import Count, Fraction, Limits, Scale, Size, UserPath
from cook.config.schema import load_schema, schema_findings
from cook.config.scheme import HeadUnitChoice, PatternScore
from cook.config.types import Precision, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class OneLineJob:
    """A model pruned by one command."""

    model: str
    """A model folder, or a name on the Hugging Face Hub."""
    data: tuple[str, ...]
    """A file or folder of text, JSON lines or parquet; may be repeated. The end of a single text file is held out for
    evaluation; of several documents, some are."""
    keep: Annotated[tuple[str, ...], Limits(metavar="KEY=VALUE")]
    """What to keep: `params=0.7` or `flops=0.7` of the whole model, or several nested sizes from one run,
    `params=0.8,0.65,0.5`; `memory_mib=200` (weights in 16 bits, and the cache of `max_length` tokens); `latency_ms=12`
    (a forward pass of one row of `max_length` tokens; the model is measured first); or any of `blocks=0.8`,
    `heads=0.5`, `experts=0.5`, `dims=0.7` (shares, or numbers per block), `head_dims=0.5` (dims per head) and
    `hidden=0.8` (shares or numbers)."""
    output: str
    """Folder for everything: `recipe/`, `run/`, `model/` (the small model), `report/`."""
    vocabulary: Annotated[str, Limits(metavar="FILE|min_count=N")] = ""
    """Removes tokens from the tokenizer and the model before masks are learned: those that occur less than N times in
    the data, or those that a file of `cook data vocabulary` leaves out. Budgets count them. None by default."""
    head_unit: HeadUnitChoice = "auto"
    """Unit of attention that is removed if query heads share keys and values: `query_head` (with `params` or `flops`,
    keys and values go with the last query head that reads them), `kv_group`, or `auto` (query heads with `params` or
    `flops`, else whole groups if these reach the number of heads)."""
    hidden: bool = False
    """With a budget for the whole model: hidden dims are units of it too."""
    units: Annotated[tuple[str, ...], Limits(metavar="NAME")] = ()
    """With a budget for the whole model: what it may take, `blocks`, `heads`, `experts`, `dims`, `head_dims` (dims of
    all heads), `hidden`, or `all` that the model has; may be repeated. By default heads and dims, or heads and
    experts."""
    pin: Annotated[tuple[str, ...], Limits(metavar="NAME")] = ()
    """With a budget for the whole model: units that stay as they are, such as `heads` with `--units all`."""
    round_to: Size = 1
    """The FFN dims per block and the hidden dims that stay are multiples of this number, such as 64."""
    compensation: Literal["auto", "on", "off"] = "auto"
    """Whether what the removed heads and FFN dims add on average stays as a bias of their block's output projection.
    `auto`: if the model's class can have such a bias, and there is one size."""
    search: Literal["layer", "block", "none"] = "layer"
    """With `blocks` alone: what a search removes at once, each time what raises the loss on 2 batches least: a whole
    `layer`, or an attention or FFN `block`. `none`: gates are learned instead."""
    steps: Size = 100
    """Steps in which the masks are learned, with the weights frozen."""
    finetune_steps: Count = 0
    """Steps of finetuning with the masks fixed, afterwards."""
    teacher: str = "self"
    """`self` (the model with nothing removed), the folder of another model, or `none`. A teacher keeps the masks from
    overfitting to the calibration text."""
    max_length: Annotated[int, Limits(minimum=2)] = 512
    """Tokens per row."""
    batch_size: Size = 2
    """Rows per step."""
    learning_rate: Scale = 3e-5
    """Learning rate of the weights in finetuning."""
    text_field: str = "text"
    """Key or column that holds the text of JSON lines and tables."""
    seed: Count = 0
    """Random seed."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The machines that a plan is made for."""

    gpus: Size | None = None
    """Ranks per host. Default: those that a launcher has announced (`WORLD_SIZE`), else 1."""
    hosts: Size = 1
    """Number of hosts."""
    card: str | None = None
    """Card of every rank, for times: H200, H100, A100-80, A100-40, L40S, RTX4090, MI300X, Ascend910B, or `cpu`: this
    machine, measured for two seconds."""
    link: Annotated[float, Limits(exclusiveMinimum=0)] = 100.0
    """Gbit/s of a host's network, all its adapters together. Matters with several hosts only."""
    suggest: bool = False
    """Also print the fastest ZeRO stage, micro-batch and checkpointing that fit on the card."""

    def check(self) -> None:
        """Raises UserErrors with all invalid values."""
        values = {"--gpus": 1 if self.gpus is None else self.gpus, "--hosts": self.hosts, "--link": self.link}
        errors = [
            UserError(f"{name}: too small", wanted="above 0" if name == "--link" else "at least 1", got=value)
            for name, value in values.items()
            if value <= 0
        ]
        if self.suggest and self.card is None:
            errors.append(UserError("--suggest needs a card", remedy="name it with --card, such as --card H100"))
        if errors:
            raise UserErrors("the command line cannot be used", errors)


TaskMode = Literal["pretrain", "prune", "export"]
Positive = Annotated[float, Limits(exclusiveMinimum=0, maximum=10**6)]
Sparsities = Annotated[tuple[float, ...], Limits(title="numbers, separated by spaces or commas")]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The settings of a run on a GLUE task or SQuAD."""

    mode: TaskMode
    """`pretrain`: fine-tune the dense model on the task. `prune`: score, mask and recover, stage by stage. `export`:
    write the compact model."""
    task_name: str
    """CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI, SQuAD1.1 or SQuAD2.0."""
    data_dir: UserPath = "data/glue"
    """Folder that contains the tasks' folders, or for SQuAD its JSON files."""
    model: str = ""
    """The model that `pretrain` fine-tunes: a Hugging Face folder or Hub name, or a BERT folder from Google."""
    output_dir: UserPath = ""
    """Folder for all outputs; default: results/tasks/TASK."""
    finetuned: UserPath = ""
    """The dense model to prune; default: the result of `pretrain` in the output folder."""
    pruning_type: str = "8"
    """Number (0 to 8) or name of the pattern, such as tile_wise_k, unstructured, m4n2_1d."""
    granularity: Size = 128
    """Columns per tile (G)."""
    block: Size = 32
    """Side length of a block (B, type 5)."""
    vector: Size = 16
    """Inputs per vector (type 4)."""
    score: PatternScore = "taylor_w2"
    """Importance of a weight: taylor_w2, taylor or magnitude."""
    quirks: str = ""
    """Historical behaviours to reproduce: `historical` for all, or names separated by commas."""
    sparsities: Sparsities = (50.0,)
    """Sparsity in percent after each stage, in ascending order."""
    scoring_steps: Size = 100
    """Steps over which the scores of a stage are accumulated."""
    epochs: Positive = 3.0
    """Epochs of the fine-tuning, or of the recovery of each stage."""
    train_batch_size: Size = 32
    """Rows per step, over all ranks."""
    micro_batch_size: Size = 32
    """Maximal number of rows that a rank processes at once."""
    eval_batch_size: Size = 64
    """Rows per batch in evaluations."""
    learning_rate: Positive = 2e-5
    """Peak learning rate, reached after the warmup; it then falls linearly to 0."""
    warmup: Fraction = 0.1
    """Fraction of the steps in which the learning rate rises."""
    weight_decay: Fraction = 0.01
    """Weight decay of AdamW, on matrices only."""
    clip: Scale = 1.0
    """Maximal gradient norm. 0: no clipping."""
    max_length: Annotated[int, Limits(minimum=4, maximum=10**9)] = 128
    """Maximal number of tokens per row."""
    doc_stride: Size = 128
    """SQuAD: tokens between the starts of two windows of a long document."""
    max_query_length: Size = 64
    """SQuAD: maximal number of tokens in a question."""
    n_best: Size = 20
    """SQuAD: length of the n-best lists."""
    max_answer_length: Size = 30
    """SQuAD: maximal number of tokens in an answer."""
    int8: bool = False
    """True or false: whether `export` rounds the layers' weights to int8, for products in int8 on a CPU. It then writes
    to `export_int8/`."""
    null_threshold: float = 0.0
    """SQuAD2.0: the answer is empty if "no answer" scores higher than the best answer by more than this."""
    distillation: Scale = 0.0
    """GLUE: weight of the divergence from the dense model's predictions in recoveries. 0: off."""
    temperature: Positive = 2.0
    """Temperature that softens both predictions in the distillation."""
    precision: Precision = "auto"
    """Auto (bf16 if the device supports it), fp32, bf16 or fp16."""
    deepspeed: UserPath = ""
    """File with a DeepSpeed config; default: ZeRO stage 0 on one rank, 2 on several."""
    save_every: Count = 0
    """Steps between checkpoints. 0: only at the end of a training."""
    log_every: Size = 10
    """Steps between log lines."""
    tensorboard: bool = True
    """True or false: whether to write scalars for TensorBoard."""
    threads: Count = 0
    """CPU threads per rank. 0: the machine's cores divided by its ranks."""
    rank_timeout: Scale = 300.0
    """Seconds after which a silent rank or an unfinished step ends the run; ten times as many for a first step or a
    save. 0: never."""
    seed: Count = 42
    """Seed of new weights, data order and dropout."""
    resume: Literal["auto", "never"] = "auto"
    """Auto: skip finished stages and resume from checkpoints. Never: start over."""

    @property
    def is_squad(self) -> bool:
        return self.task_name.lower().startswith("squad")

    @property
    def folder(self) -> Path:
        """The folder for all outputs."""
        return Path(self.output_dir or f"results/tasks/{self.task_name}")

    def steps(self, rows: int) -> int:
        """Returns the optimizer steps for `rows` rows per epoch. The next epoch's first rows fill the last batch."""
        return max(1, math.ceil(self.epochs * rows / self.train_batch_size))

    def training(self, steps: int, *, frozen: bool = False) -> TrainingConfig:
        """Returns the settings of one training of `steps` optimizer steps. `frozen`: the weights do not change."""
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
        """Reads the DeepSpeed config, with its "auto" values unchanged."""
        if not self.deepspeed:
            return {}
        content = read_json(self.deepspeed)
        if not isinstance(content, dict):
            raise UserError(f"{self.deepspeed}: not a DeepSpeed config", wanted="a JSON object")
        return content


def parse_task_options(arguments: list[str] | None = None) -> TaskConfig:
    """Parses the command line. Raises UserErrors with all invalid values."""
    options = load_schema("tasks")["properties"]
    parser = argparse.ArgumentParser(
        prog="cook/tasks.py",
        allow_abbrev=False,
        description="Fine-tunes, prunes and exports an encoder on a GLUE task or SQuAD.",
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
    errors = [UserError(f"--{name}: invalid value", wanted=w, got=repr(given[name])) for name, w in invalid.items()]
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
    """Formats a default as on the command line."""
    return " ".join(f"{item:g}" for item in value) if isinstance(value, list) else str(value).replace("%", "%%")


def _parsed(node: dict[str, Any], text: str) -> Any:
    """Converts an option to its type. Returns the text itself if that fails, which the schema then refuses."""
    try:
        if node.get("type") == "array":
            return [float(part) for part in text.replace(",", " ").split()]
        if node.get("type") == "boolean":
            return {"true": True, "false": False}[text.lower()]
        return {"integer": int, "number": float}.get(node.get("type", "string"), str)(text)
    except (ValueError, KeyError):
        return text
