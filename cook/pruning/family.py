"""What cook must know of a model family: one record of plain functions, no behaviour elsewhere.

Of a family that stock transformers has, `cook.families.stock` makes the record from a table of names. A family of its
own writes the functions itself. Either way it is one file, and one line in `registry.py` or one call of `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cook.base.batches import Batch
from cook.pruning.units import HeadUnit, PruningSpace

ModelConfig = Mapping[str, Any]
"""A model's `config.json` as a dictionary."""
KeptUnits = Mapping[str, tuple[int, ...]]
"""For each masked group's name the indices of the units that stay, ascending."""


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """What becomes of a model when masks are carried out."""

    config: dict[str, Any]
    """The config of the reshaped model."""
    layers: tuple[int, ...]
    """The layers that are still there, by their old numbers."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """New keys of weights whose layer has another number now that whole layers are gone."""


@dataclass(frozen=True, kw_only=True)
class Modeling:
    """The code that an export carries where stock transformers cannot load the result."""

    file: Path
    auto_map: Mapping[str, str]
    """The `auto_map` of the export's config.json; its values name the file's copy, `module.Class`."""


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a family's result can be where all layers are alike, for the table of families."""

    shares_keys: bool
    """Whether query heads may share keys and values, so that there are two kinds of units of attention."""
    stock_heads: bool
    """Whether a stock class holds blocks with fewer heads."""
    stock_heads_except: str = ""
    """Models of which it does not, in a word."""
    stock_layers: bool
    """Whether a stock class holds the model without some of its layers."""
    is_stock: bool = True
    """Whether the family's models are loaded by a stock class at all."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A model family."""

    family: str
    """The family's name, in tables and messages."""
    model_types: frozenset[str | None]
    """Values of `model_type` in a config.json that this adapter reads; None for a config that has no such field."""
    space: Callable[..., PruningSpace]
    """(config, head_unit="kv_group") → the pruning space of a model with this config; no weights are needed."""
    head_units: Callable[[ModelConfig], tuple[HeadUnit, ...]]
    """The units of attention that the model has; one entry where all are the same thing."""
    build: Callable[[ModelConfig], torch.nn.Module]
    """A freshly initialised model on the current default device."""
    read: Callable[[ModelConfig, Mapping[str, torch.Tensor]], tuple[dict[str, Any], Mapping[str, torch.Tensor]]]
    """Config and tensors of any format of the family, mapped lazily to the native one."""
    shrink: Callable[[ModelConfig, PruningSpace, KeptUnits], Shrunk]
    """The reshaped model's config: of the stock class wherever that can hold the result."""
    stock_holds: Callable[[ModelConfig, int, int], bool]
    """(config, heads, kv_heads) → whether all attention blocks can have these without remote code."""
    modeling: Callable[[ModelConfig], Modeling | None]
    """The code that a model with this config needs; None where stock transformers loads it."""
    inputs: Callable[[Batch], Batch]
    """The model's call for a batch of `cook.data.packing`, `targets` excepted; samples of one row must not mix."""
    abilities: Abilities
    """What its results can be."""
    file_names: Callable[[ModelConfig], Mapping[str, str]] = lambda _config: {}
    """The keys under which files of the family hold weights, where they are not the model's own."""
    is_causal: bool = True
    """Whether the model predicts the next token."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other spellings in `pruned_module`: a suffix and the suffixes that it stands for."""
    live_config: Callable[[ModelConfig], dict[str, Any] | str] | None = None
    """The config in the family's own distribution format, or a sentence why that format cannot hold the model; None
    for a family that has no such format beside Hugging Face's."""


class Stored(Mapping[str, torch.Tensor]):
    """The tensors of a model's files, which notes the names that are read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors, self.read = tensors, set[str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # Mapping's own would read the tensor


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model on disk: its config and, read one at a time, its weights, both in the family's native form."""

    adapter: Adapter
    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]
    path: Path
    """The folder or file that was given."""
    stored: Stored = field(default_factory=lambda: Stored({}))
    """The same weights under the names that the files have, and all else in the files; empty for a model in memory."""

    @property
    def folder(self) -> Path:
        """The folder whose tokenizer and other files belong to the model."""
        return self.path.parent if self.path.is_file() and (self.path.parent / "config.json").is_file() else self.path

    def stored_for(self, names: Iterable[str]) -> set[str]:
        """The names in the files of the tensors that `names`, those of the native form, are made of."""
        self.stored.read.clear()
        for name in names:
            if name in self.tensors:
                self.tensors[name]  # mapped from the file, not read whole
        return set(self.stored.read)
