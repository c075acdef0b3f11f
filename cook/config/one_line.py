"""The options of `cook prune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cook.config.declare import Count, Limits, Scale, Size


@dataclass(frozen=True, kw_only=True)
class OneLineJob:
    """A model pruned by one command."""

    model: str
    """A model folder, or a name on the Hugging Face Hub."""

    data: tuple[str, ...]
    """A file or folder of text, JSON lines or parquet; may be repeated. The end of a single text file is held out for
    evaluation; of several documents, some are."""

    keep: Annotated[tuple[str, ...], Limits(metavar="KEY=VALUE")]
    """What to keep: `params=0.7` or `flops=0.7` of the whole model, or any of `blocks=0.8`, `heads=0.5`, `dims=0.7`
    (shares, or numbers of heads and dims per block)."""

    output: str
    """Folder for everything: `recipe/`, `run/`, `model/` (the small model), `report/`."""

    steps: Size = 100
    """Steps in which the masks are learned, with the weights frozen."""

    finetune_steps: Count = 0
    """Steps of finetuning with the masks fixed, afterwards."""

    teacher: str | None = None
    """`self` (the model with nothing removed), or the folder of another model."""

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
