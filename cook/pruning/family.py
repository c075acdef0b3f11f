"""The adapter of a model family: one record of functions and names.

For a family of stock transformers, `cook.families.stock` makes the record from a table of names. Any other family
writes the functions itself. Either way it is one file, and one line in `registry.py` or one call of `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cook.base.batches import Batch, CallForm, as_it_is
from cook.base.errors import UserError
from cook.base.tensor_files import LazyTensors, shapes_of
from cook.pruning.units import HeadUnit, PruningSpace

ModelConfig = Mapping[str, Any]
"""A model's `config.json` as a dictionary."""
KeptUnits = Mapping[str, tuple[int, ...]]
"""The indices of the units that stay, ascending, by the name of the masked group."""

Experts = Mapping[str, Mapping[str, Any]]
"""FFN blocks that are mixtures of experts, as `cook.models.cook_experts.add_experts` takes them."""


def vocabulary_size(config: ModelConfig) -> int:
    """The number of ids in a model's vocabulary; that of the text part, for a model of several parts."""
    parts = [part for part in config.values() if isinstance(part, Mapping) and "vocab_size" in part]
    return int((config if "vocab_size" in config else parts[0])["vocab_size"])


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """The config and the layers of a reshaped model."""

    config: dict[str, Any]
    """The config of the reshaped model."""
    layers: tuple[int, ...]
    """The layers that remain, by their old numbers."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """New keys of the weights of layers that were renumbered because whole layers were removed."""


@dataclass(frozen=True, kw_only=True)
class Modeling:
    """The code that an export contains if stock transformers cannot load the result."""

    file: Path
    auto_map: Mapping[str, str]
    """The `auto_map` of the export's config.json; its values name the file's copy, `module.Class`."""
    imported: tuple[Path, ...] = ()
    """Files that it imports, which are copied under their own names."""


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """Which reshaped models of a family stock classes can load, for the table of families."""

    shares_keys: bool
    """Whether query heads can share keys and values, so that attention has two kinds of units."""
    stock_heads: bool
    """Whether a stock class can load blocks with fewer heads."""
    stock_heads_except: str = ""
    """Models for which it cannot, in a few words."""
    stock_dims: bool = True
    """Whether a stock class can load blocks with fewer FFN dimensions."""
    head_dims: bool = True
    """Whether heads can have fewer dimensions at all."""
    hidden: bool = True
    """Whether the hidden size can be pruned at all."""
    stock_layers: bool
    """Whether a stock class can load the model without some of its layers."""
    experts: bool = False
    """Whether its FFN blocks can be mixtures of experts."""
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
    """The kinds of attention units that the model has; one entry if they are the same."""
    build: Callable[[ModelConfig], torch.nn.Module]
    """A freshly initialised model on the current default device."""
    read: Callable[[ModelConfig, Mapping[str, torch.Tensor]], tuple[dict[str, Any], Mapping[str, torch.Tensor]]]
    """Config and tensors of any format of the family, converted lazily to the native one."""
    shrink: Callable[..., Shrunk]
    """(config, space, kept, renumber=True) → the reshaped model's config: that of the stock class if it can load the
    result. Without `renumber`, weights and modules that stay keep their names."""
    stock_holds: Callable[..., bool]
    """(config, heads, kv_heads, hidden=None, head_dim=None) → whether all attention blocks can have these numbers, and
    the model this hidden size and size of heads, without remote code."""
    modeling: Callable[[ModelConfig], Modeling | None]
    """The code that a model with this config needs; None if stock transformers loads it."""
    inputs: Callable[[Batch], Batch]
    """The model's arguments for a batch of `cook.data.packing`, without `targets`; samples of a row must not mix.
    `call_form` gives the function for a config."""
    abilities: Abilities
    """Which of its reshaped models stock classes can load."""
    on_host: CallForm = as_it_is
    """Adds to a batch, before it is moved to the device, what the model would have to ask the device for."""
    file_names: Callable[[ModelConfig], Mapping[str, str]] = lambda _config: {}
    """The keys of the weights in the family's files, if they differ from the model's keys."""
    inputs_by_config: Callable[[ModelConfig, Batch], Batch] | None = None
    """`inputs`, for a family whose arguments depend on the config."""
    is_causal: bool = True
    """Whether the model predicts the next token."""
    mixes_samples: Callable[[ModelConfig], bool] = lambda _config: False
    """Whether the model's class cannot separate samples in one row, so that the main command cannot train it."""
    score_bias: bool = False
    """Whether a learned bias per head is added to the attention scores; its gradient needs memory."""
    experts: Callable[[ModelConfig], Experts] = lambda _config: {}
    """The FFN blocks of a model that are mixtures of experts."""
    with_experts: Callable[[ModelConfig, Experts], dict[str, Any]] | None = None
    """(config, experts) → the config of the model with these experts; None if the family cannot have any."""
    with_biases: Callable[[ModelConfig], dict[str, Any]] = dict
    """config → the config of the same class in which output projections have a bias, where it has a setting for it."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Aliases in `pruned_module`: a suffix and the suffixes that it stands for."""
    live_format: (
        Callable[[ModelConfig, Mapping[str, torch.Tensor]], tuple[dict[str, Any], Mapping[str, torch.Tensor]] | str]
        | None
    ) = None
    """Config and weights in the family's own distribution format, or a sentence why that format cannot store the model;
    None for a family that has only Hugging Face's format."""

    def call_form(self, config: ModelConfig) -> Callable[[Batch], Batch]:
        """The function from a batch of `cook.data.packing` to the arguments of a model with this config."""
        return self.inputs if self.inputs_by_config is None else partial(self.inputs_by_config, config)


def refuse_experts(experts: Experts) -> None:
    """Raises a UserError if a model to be cut was carved into experts, whose dims and routers belong together."""
    if experts:
        raise UserError(
            "the model's FFN blocks were carved into experts, which cannot be cut",
            remedy="prune the dense model first, and put the stage moefy after the stages that prune",
        )


class Stored(LazyTensors):
    """The tensors of a model's files; records the names that are read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        shapes = tensors.shapes if isinstance(tensors, LazyTensors) else shapes_of(tensors)
        super().__init__({name: partial(tensors.__getitem__, name) for name in tensors}, shapes)
        self.read = set[str]()
        self.only_shapes = False
        """True: reads nothing, and returns tensors without values."""

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        if self.only_shapes and name in self.shapes:
            return torch.empty(self.shapes[name], device="meta")
        return super().__getitem__(name)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model on disk: its config and its weights, which are read one at a time, in the family's native form."""

    adapter: Adapter
    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]
    path: Path
    """The folder or file that the user named."""
    stored: Stored = field(default_factory=lambda: Stored({}))
    """All tensors in the files, by the files' names; empty for a model in memory."""

    @property
    def folder(self) -> Path:
        """The folder with the model's tokenizer and other files."""
        return self.path.parent if self.path.is_file() and (self.path.parent / "config.json").is_file() else self.path

    def stored_for(self, names: Iterable[str]) -> set[str]:
        """The names in the files of the tensors that the native tensors `names` are made of."""
        self.stored.read.clear()
        parts: Mapping[str, Iterable[str]] = getattr(self.tensors, "parts", {})
        for name in (name for name in names if name in self.tensors):
            if name in parts:
                self.stored.read.update(parts[name])
                continue
            self.stored.only_shapes = True
            try:
                self.tensors[name]
            except RuntimeError:  # a conversion that needs values
                self.stored.only_shapes = False
                self.tensors[name]
            finally:
                self.stored.only_shapes = False
        return set(self.stored.read)
