"""The folders and settings of a task's run: the fine-tuning, the pruning stages, the export."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cook.base.errors import UserError
from cook.config.tasks import TaskConfig
from cook.sparsity.schedule import check_schedule
from cook.sparsity.spec import PatternSpec, Quirks

DATA_SETTINGS = ("task_name", "max_length", "doc_stride", "max_query_length")
FIT_SETTINGS = (
    "epochs",
    "train_batch_size",
    "learning_rate",
    "warmup",
    "weight_decay",
    "clip",
    "precision",
    "deepspeed",
    "seed",
)
PRUNE_SETTINGS = ("scoring_steps", "distillation", "temperature")


@dataclass(frozen=True, kw_only=True)
class PruneStage:
    """One stage of pruning."""

    sparsity: float
    """Percent that are pruned after it."""
    folder: Path
    """Its outputs."""

    @property
    def name(self) -> str:
        return f"{self.sparsity:g}%"


def pretrain_folder(config: TaskConfig) -> Path:
    """Where the fine-tuned dense model goes."""
    return config.folder / "pretrain"


def pattern_spec(config: TaskConfig) -> PatternSpec:
    """The pattern that a config names.

    Raises:
        UserError: no such pattern, score or quirk.
    """
    kind = int(config.pruning_type) if config.pruning_type.isdecimal() else config.pruning_type
    return PatternSpec(
        type=kind,
        granularity=config.granularity,
        block=config.block,
        vector=config.vector,
        score=config.score,
        quirks=_quirks(config.quirks),
    )


def _quirks(text: str) -> Quirks:
    if text == "historical":
        return Quirks.historical()
    names = [name for name in text.replace(",", " ").split() if name]
    known = [field.name for field in dataclasses.fields(Quirks)]
    for name in names:
        if name not in known:
            raise UserError(f"--quirks: unknown name {name!r}", wanted=f"historical, or {', '.join(known)}")
    return Quirks(**{name: True for name in names})


def prune_folder(config: TaskConfig) -> Path:
    """Where the stages of one pattern go."""
    spec = pattern_spec(config)
    return config.folder / f"prune_{spec.name}"


def prune_stages(config: TaskConfig) -> tuple[PruneStage, ...]:
    """The stages in order.

    Raises:
        UserError: the sparsities do not rise, or leave 0 to 100.
    """
    check_schedule(config.sparsities)
    root = prune_folder(config)
    return tuple(PruneStage(sparsity=s, folder=root / f"sparsity_{s:g}") for s in config.sparsities)
