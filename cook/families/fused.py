"""Files that store every expert by itself, as most published models do, read as the fused weights of the classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from cook.base.tensor_files import LazyTensors, known_shape

Parts = Sequence[Sequence[str]]
"""The names in the files: for each product (gate, up) one per expert."""


def with_fused_experts(model: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The tensors of a file, in which experts that transformers fuses when it loads them are fused on access.

    Only its conversions of lists of experts are followed; names that others would convert stay as they are.

    Args:
        model: The model, without weights.
        tensors: The tensors in the files, by their names.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns if _fuses(entry)}
    if not by_pattern:
        return tensors
    state = model.state_dict()
    found: dict[str, dict[str, list[str]]] = {}
    for name in tensors:
        own, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern in by_pattern and own in state and own != name:
            found.setdefault(own, {}).setdefault(pattern, []).append(name)
    fused: dict[str, Parts] = {}
    for own, names in found.items():
        order = by_pattern[next(iter(names))].source_patterns
        fused[own] = [sorted(names[pattern], key=_numbers) for pattern in order if pattern in names]
    used = {name for parts in fused.values() for part in parts for name in part}
    readers = {name: partial(tensors.__getitem__, name) for name in tensors if name not in used}
    readers |= {own: partial(_fused, tensors, parts) for own, parts in fused.items()}
    shapes = {name: shape for name in readers if name in tensors and (shape := known_shape(tensors, name)) is not None}
    shapes |= {own: _fused_shape(tensors, parts) for own, parts in fused.items()}
    return LazyTensors(readers, shapes, {own: [n for part in parts for n in part] for own, parts in fused.items()})


def _fuses(entry: WeightConverter) -> bool:
    """Whether a conversion stacks experts, and joins their products along the outputs."""
    stacks, *joins = entry.operations
    return (
        isinstance(stacks, MergeModulelist)
        and stacks.dim == 0
        and all(isinstance(join, Concatenate) and join.dim == 1 for join in joins)
    )


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _fused(tensors: Mapping[str, torch.Tensor], parts: Parts) -> torch.Tensor:
    return torch.cat([torch.stack([tensors[name] for name in part]) for part in parts], 1)


def _fused_shape(tensors: Mapping[str, torch.Tensor], parts: Parts) -> tuple[int, ...]:
    shapes = [known_shape(tensors, part[0]) for part in parts]
    assert all(shapes), "experts whose shapes are not known"
    return len(parts[0]), sum(shape[0] for shape in shapes if shape), *(shapes[0] or ())[1:]
