"""The `data` section of `bmcook.json`: the corpus, its sources, how they are mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

UserPath = Annotated[str, "path"]
"""A path as the user wrote it, but with `~` resolved; relative paths start at the current working directory."""

DataType = Literal["python_stdlib", "text", "jsonl", "parquet", "arrow", "hub", "cpm_live", "downstream"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources of the corpus; every key means what it means in `DataConfig`."""

    type: DataType
    """Format of the source."""

    paths: tuple[UserPath, ...] = ()
    """Files, folders or glob patterns."""

    name: UserPath | None = None
    """What logs call the source, and for `hub` the dataset's name. None: its type and place in the list."""

    subset: str | None = None
    """Which configuration of a Hub dataset, where it has several."""

    split: str = "train"
    """Which split of a Hub dataset, or of an arrow folder that has several."""

    text_field: str = "text"
    """Key or column that holds the text."""

    held_out_paths: tuple[UserPath, ...] = ()
    """A separate evaluation corpus of the same type for this source."""

    weight: float | None = None
    """How often its rows are read, in proportion to the other sources' weights; None in all: every row once an
    epoch."""

    streaming: bool = False
    """True: read and tokenised while training runs, for what is too large to prepare before."""


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """Weights of the sources that follow their losses (LLM-Shearing)."""

    every: int
    """Steps between two updates of the weights."""

    reference: dict[str, float]
    """Loss that each source, by its name, is expected to come down to."""

    rows: int = 64
    """Held-out rows of each source that an update reads."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus, and how rows are cut from it."""

    type: DataType | None = None
    """`python_stdlib`: the running Python's standard library; `text`: plain files; `jsonl`: one JSON object a line;
    `parquet`: tables; `arrow`: folders of `save_to_disk`; `hub`: a dataset's name; `cpm_live`: folders of CPM-Live's
    binary data; `downstream`: JSON lines with an input and a target. None: `sources` says it."""

    paths: tuple[UserPath, ...] = ()
    """Files, folders or glob patterns of the corpus; empty for `python_stdlib` and `hub`."""

    name: UserPath | None = None
    """Name of a Hub dataset, or a folder that looks like one."""

    subset: str | None = None
    """Which configuration of a Hub dataset, where it has several."""

    split: str = "train"
    """Which split of a Hub dataset, or of an arrow folder that has several."""

    text_field: str = "text"
    """Key that holds the text in a JSON line, column that holds it in a table."""

    streaming: bool = False
    """True: read and tokenised while training runs, for what is too large to prepare before."""

    sources: tuple[SourceConfig, ...] = ()
    """Several sources in place of the one that the keys above describe."""

    mixing: MixingConfig | None = None
    """Weights that follow the sources' losses. None: they stay as they are."""

    held_out: float = 0.03
    """Fraction of the documents kept for evaluation, split by file or document; unused if `held_out_paths` is given."""

    held_out_paths: tuple[UserPath, ...] = ()
    """Files, folders or glob patterns of a separate evaluation corpus."""

    max_length: int
    """Tokens in a row, the prompt included."""

    cache_dir: UserPath | None = None
    """Folder for the tokenised corpus. None: inside the output folder."""

    workers: int = 0
    """Processes a rank that build batches ahead; 0: the training process builds each batch itself."""

    ledger: bool = False
    """True: every rank notes which samples it reads, `ledger-<rank>.jsonl` in the stage's folder."""
