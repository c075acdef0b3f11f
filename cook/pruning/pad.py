"""Padding of uneven masks: every block gets as many units as the largest block, the added ones all zero.

A unit whose weights are zero adds nothing, so the result computes the same as the masked model, and a stock class
that has one size for all layers can load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from cook.base.errors import UserError
from cook.base.tensor_files import LazyTensors
from cook.pruning.family import ModelSource
from cook.pruning.mask_set import Masks, kept_counts
from cook.pruning.reshape import kept_units
from cook.pruning.units import PruningSpace, UnitGroup, WeightSlice

Zeroed = list[tuple[WeightSlice, tuple[int, ...]]]


def padded(source: ModelSource, space: PruningSpace, masks: Masks) -> tuple[ModelSource, dict[str, torch.Tensor]]:
    """Returns the model with zeros in the padding units, and even masks that keep these units.

    Layers without any kept unit are removed, or padded if the family cannot remove layers.

    Raises:
        UserError: the model already lacks blocks, which cannot be padded, or no stock class can load the sizes.
    """
    layers = set(source.adapter.shrink(source.config, space, kept_units(space, masks)).layers)
    even = {g.name: torch.tensor([float(g.layer in layers)]) for g in space.of("layer")}
    zeroed: dict[str, Zeroed] = {}
    emptied: set[str] = set()
    for kind in ("heads", "dimff"):
        groups = [g for g in space.groups if g.kind == kind and g.layer in layers]
        if len(groups) < len(layers):
            raise UserError(
                "--uniform: the model already lacks blocks, and a missing block cannot be padded",
                remedy="leave --uniform out, or prune the original model in one step",
            )
        size = _section_size(source, space, masks, groups)
        for group in groups:
            is_gone = not masks.get(space.block(group).name, torch.ones(1)).all()
            own = torch.zeros(group.size) if is_gone else masks.get(group.name, torch.ones(group.size))
            even[group.name] = _filled(group, own, size)
            added = tuple((even[group.name] > own).nonzero().flatten().tolist())
            for piece in group.slices if added else ():
                zeroed.setdefault(piece.path, []).append((piece, added))
            emptied |= set(space.block(group).residue) if is_gone else set()
    if source.adapter.modeling(source.adapter.shrink(source.config, space, kept_units(space, even)).config):
        raise UserError("--uniform: this family always needs its modeling file", remedy="leave --uniform out")
    readers = {p: partial(_read, source.tensors, p, zeroed.get(p, []), p in emptied) for p in space.shapes}
    return replace(source, tensors=LazyTensors(readers)), even


def _section_size(source: ModelSource, space: PruningSpace, masks: Masks, groups: list[UnitGroup]) -> int:
    """Units per section of the largest group, or the next larger number that a stock class can load."""
    counts = kept_counts(masks)
    kept = [counts.get(space.block(g).name, 1) * counts.get(g.name, g.size) // g.sections for g in groups]
    first = groups[0]
    for size in range(max(1, *kept), first.section_size + 1):
        if first.kind == "dimff" or source.adapter.stock_holds(source.config, *first.heads(size * first.sections)):
            return size
    raise UserError(
        "--uniform: no transformers class can load these sizes in all layers",
        remedy="leave --uniform out: the folder then gets its own modeling file",
    )


def _filled(group: UnitGroup, own: torch.Tensor, size: int) -> torch.Tensor:
    """The mask with removed units put back, the first of each section first, until each keeps `size`."""
    by_section = own.view(group.sections, -1)
    lacking = size - by_section.sum(1, keepdim=True)
    put_back = (1 - by_section) * ((1 - by_section).cumsum(1) <= lacking)
    return (by_section + put_back).flatten()


def _read(tensors: Mapping[str, torch.Tensor], path: str, zeroed: Zeroed, is_empty: bool) -> torch.Tensor:
    tensor = tensors[path]
    if is_empty:
        return torch.zeros_like(tensor)
    for piece, units in zeroed:
        starts = piece.offset + torch.tensor(units) * piece.block
        indices = (starts[:, None] + torch.arange(piece.block)).flatten()
        tensor = tensor.index_fill(piece.dim, indices, 0)
    return tensor
