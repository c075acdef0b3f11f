"""What cook must know of a model family: one record of plain functions, no behaviour elsewhere.

A new family is one file that builds an `Adapter` and one line in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cook.space.units import PruningSpace

ModelConfig = Mapping[str, Any]
"""A model's `config.json` as a dictionary."""
KeptUnits = Mapping[str, tuple[int, ...]]
"""For each masked group's name the indices of the units that stay, ascending."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A model family."""

    family: str
    """The name in `model.type`."""
    model_types: frozenset[str | None]
    """Values of `model_type` in a config.json that this adapter reads; None for a config that has no such field."""
    space: Callable[[ModelConfig], PruningSpace]
    """The pruning space of a model with this config; no weights are needed."""
    build: Callable[[ModelConfig], torch.nn.Module]
    """A freshly initialised model on the current default device."""
    read: Callable[[ModelConfig, Mapping[str, torch.Tensor]], tuple[dict[str, Any], Mapping[str, torch.Tensor]]]
    """Config and tensors of any format of the family, mapped lazily to the native one."""
    shrunk_config: Callable[[ModelConfig, KeptUnits], dict[str, Any]]
    """The config of the reshaped model."""
    aliases: Mapping[str, tuple[str, ...]]
    """Other spellings in `pruned_module`: a suffix and the suffixes that it stands for."""
    logits_weight: str
    """Key of the matrix that makes the logits."""
    modeling_file: Path | None
    """The file that an export carries where stock transformers cannot load the result."""
    auto_map: Mapping[str, str]
    """The `auto_map` of an export's config.json, if it carries a modeling file."""
    live_config: Callable[[ModelConfig], dict[str, Any] | str]
    """The config in the family's own distribution format, or a sentence why that format cannot hold the model."""
