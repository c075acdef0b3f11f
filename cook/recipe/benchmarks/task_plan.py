"""The folders and settings of a benchmark run: fine-tuning, pruning stages, export."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from cook.base.errors import UserError
from cook.config.tasks import TaskConfig
from cook.recipe.benchmarks.task import task_files
from cook.recipe.sources import DONE, model_files
from cook.sparsity.spec import PatternSpec, Quirks, check_schedule

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


MASKS = "masks.safetensors"


@dataclass(frozen=True, kw_only=True)
class TaskStage:
    """Fine-tuning of the dense model, or one stage of pruning."""

    name: str
    config: TaskConfig
    folder: Path
    """Its outputs."""
    source: str
    """The folder or Hub name of the model to start from."""
    after: str | None = None
    """The stage that `source` is the model of, if a stage of this run made it."""
    sparsity: float | None = None
    """Sparsity after the stage, in percent; None for the fine-tuning of the dense model."""
    previous_masks: Path | None = None
    """The masks of the previous stage, which stay pruned."""
    redo: str = "the same command with"

    @property
    def done(self) -> Path:
        return self.folder / DONE

    @property
    def done_before(self) -> Path | None:
        return Path(self.source).parent / DONE if self.after else None

    @property
    def masks(self) -> Path:
        """The mask file that a stage of pruning writes."""
        return self.folder / MASKS

    def fingerprint(self) -> str:
        names = DATA_SETTINGS + FIT_SETTINGS + (() if self.sparsity is None else PRUNE_SETTINGS)
        described = {name: getattr(self.config, name) for name in names}
        if self.sparsity is not None:
            described |= {"sparsity": self.sparsity, "pattern": dataclasses.asdict(pattern_spec(self.config))}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def source_files(self) -> list[Path]:
        """The start model, unless a stage of this run made it, and the files of the task."""
        model = [] if self.after else model_files(Path(self.source))
        return model + [path for path in task_files(self.config).values() if path.is_file()]

    def inherited_masks(self) -> list[str]:
        return [str(self.previous_masks)] if self.previous_masks else []

    def traces(self) -> list[Path]:
        return [self.masks]


def pretrain_stage(config: TaskConfig) -> TaskStage:
    """The fine-tuning of the dense model."""
    return TaskStage(name="pretrain", config=config, folder=config.folder / "pretrain", source=config.model)


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
    """The folder of the stages of one pattern."""
    spec = pattern_spec(config)
    return config.folder / f"prune_{spec.name}"


def prune_stages(config: TaskConfig) -> tuple[TaskStage, ...]:
    """The stages of pruning in order; each starts from the weights and the masks of the previous one.

    Raises:
        UserError: the sparsities do not increase, or are not between 0 and 100.
    """
    check_schedule(config.sparsities)
    root, dense = prune_folder(config), pretrain_stage(config)
    stages: list[TaskStage] = []
    for sparsity in config.sparsities:
        before = stages[-1] if stages else None
        start = before or dense
        made_here = before is not None or not config.finetuned
        stages.append(
            TaskStage(
                name=f"{pattern_spec(config).name} {sparsity:g}%",
                config=config,
                folder=root / f"sparsity_{sparsity:g}",
                source=str(start.folder / "model") if made_here else config.finetuned,
                after=start.name if made_here else None,
                sparsity=sparsity,
                previous_masks=before.masks if before else None,
            )
        )
    return tuple(stages)
