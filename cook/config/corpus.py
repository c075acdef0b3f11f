"""The `data` section of `bmcook.json`: the corpus, its sources, and how they are mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cook.config.declare import Limits, Size, Text, UserPath, UserPaths

DataType = Literal["python_stdlib", "text", "jsonl", "parquet", "arrow", "hub", "cpm_live", "downstream"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources of the corpus. Every key has the same meaning as in `DataConfig`."""

    type: DataType
    """Format of the source."""
    paths: UserPaths = ()
    """Files, folders or glob patterns."""
    name: UserPath | None = None
    """Name of the source in logs; for `hub` the dataset's name. None: its type and its index in the list."""
    subset: Text | None = None
    """Configuration of a Hub dataset that has several."""
    split: Text = "train"
    """Split of a Hub dataset, or of an arrow folder that has several."""
    text_field: Text = "text"
    """Key or column that holds the text."""
    held_out_paths: UserPaths = ()
    """A separate evaluation corpus of the same type for this source."""
    weight: Annotated[float, Limits(exclusiveMinimum=0, maximum=10**6)] | None = None
    """Sampling weight of its rows, relative to the other sources. None in all sources: every row is read once per
    epoch."""
    streaming: bool = False
    """True: the text is read and tokenised during training, for a corpus too large to prepare in advance."""


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """Source weights that are adapted to the sources' losses (LLM-Shearing)."""

    every: Size
    """Steps between two updates of the weights."""
    reference: dict[str, Annotated[float, Limits(minimum=0, maximum=1000)]]
    """Expected final loss of each source in nats per token, by name."""
    rows: Size = 64
    """Held-out rows per source that are evaluated for an update."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus, and how it is cut into rows."""

    type: DataType | None = None
    """`python_stdlib`: the running Python's standard library; `text`: plain files; `jsonl`: one JSON object per line;
    `parquet`: tables; `arrow`: folders of `save_to_disk`; `hub`: a dataset's name; `cpm_live`: folders of CPM-Live's
    binary data; `downstream`: JSON lines with an input and a target. None where `sources` is given."""
    paths: UserPaths = ()
    """Files, folders or glob patterns of the corpus; empty for `python_stdlib` and `hub`."""
    name: UserPath | None = None
    """Name of a Hub dataset, or a folder that looks like one."""
    subset: Text | None = None
    """Configuration of a Hub dataset that has several."""
    split: Text = "train"
    """Split of a Hub dataset, or of an arrow folder that has several."""
    text_field: Text = "text"
    """Key of a JSON line, or column of a table, that holds the text."""
    streaming: bool = False
    """True: the text is read and tokenised during training, for a corpus too large to prepare in advance."""
    sources: Annotated[tuple[SourceConfig, ...], Limits(maxItems=1000)] = ()
    """Several sources, instead of the single one that the keys above describe."""
    mixing: MixingConfig | None = None
    """Adapts the weights of the sources to their losses. None: the weights stay fixed."""
    held_out: Annotated[float, Limits(minimum=0, exclusiveMaximum=1)] = 0.03
    """Fraction of the documents held out for evaluation, split by file or document. Of a single document or text
    file, the end is held out. Unused if `held_out_paths` is given."""
    held_out_paths: UserPaths = ()
    """Files, folders or glob patterns of a separate evaluation corpus."""
    max_length: Size
    """Tokens per row, including the prompt."""
    cache_dir: UserPath | None = None
    """Folder for the tokenised corpus. None: inside the output folder."""
    workers: Annotated[int, Limits(minimum=0, maximum=1024)] = 0
    """Worker processes per rank that build batches in advance. 0: the training process builds each batch itself."""
    ledger: bool = False
    """True: each rank records the samples that it reads in `ledger-<rank>.jsonl` in the stage's folder."""
