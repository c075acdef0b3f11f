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
from cook.pruning.mask_set import Masks
from cook.pruning.reshape import kept_units
from cook.pruning.units import WIDE, PruningSpace, UnitGroup, WeightSlice

Zeroed = list[tuple[WeightSlice, tuple[int, ...]]]


def padded(source: ModelSource, space: PruningSpace, masks: Masks) -> tuple[ModelSource, dict[str, torch.Tensor]]:
    """Returns the model with zeros in the padding units, and even masks that keep these units.

    Layers without any kept unit are removed, or padded if the family cannot remove layers.

    Raises:
        UserError: the model already lacks blocks, which cannot be padded, or no stock class can load the sizes.
    """
    if any(group.name in masks and not masks[group.name].all() for group in space.groups if group.active):
        raise UserError(
            "--uniform: experts and the dims inside them cannot be padded",
            remedy="leave --uniform out; experts that keep the same number in every block need no padding",
        )
    layers = set(source.adapter.shrink(source.config, space, kept_units(space, masks)).layers)
    even = {g.name: torch.tensor([float(g.layer in layers)]) for g in space.of("layer")}
    zeroed: dict[str, Zeroed] = {}
    emptied: set[str] = set()
    for kind in ("heads", "dimff"):
        groups = [g for g in space.groups if g.kind == kind and g.layer in layers and not g.active]
        if kind == "dimff" and space.of("experts"):
            continue
        if len(groups) < len(layers):
            raise UserError(
                "--uniform: the model already lacks blocks, and a missing block cannot be padded",
                remedy="leave --uniform out, or prune the original model in one step",
            )
        own = {group.name: _own(space, masks, group) for group in groups}
        wide = {g.kind: int(masks[g.kind].sum()) * g.members if g.kind in masks else None for g in space.every}
        sections, size = _sizes(source, space, own, groups, (wide.get("hidden"), wide.get("head_dims")))
        for group in groups:
            is_gone = not masks.get(space.block(group).name, torch.ones(1)).all()
            even |= _filled(space, group, own[group.name], sections, size)
            keys = space.keys_of(group)
            before = {group.name: own[group.name].flatten()}
            before |= {keys.name: own[group.name].amax(1)} if keys is not None else {}
            for filled in (group, *([keys] if keys is not None else [])):
                added = tuple((even[filled.name] > before[filled.name]).nonzero().flatten().tolist())
                for piece in filled.slices if added else ():
                    zeroed.setdefault(piece.path, []).append((piece, added))
            emptied |= set(space.block(group).residue) if is_gone else set()
    even |= {kind: masks[kind] for kind in WIDE if kind in masks}
    if source.adapter.modeling(source.adapter.shrink(source.config, space, kept_units(space, even)).config):
        raise UserError("--uniform: this family always needs its modeling file", remedy="leave --uniform out")
    readers = {p: partial(_read, source.tensors, p, zeroed.get(p, []), p in emptied) for p in space.shapes}
    return replace(source, tensors=LazyTensors(readers)), even


def _own(space: PruningSpace, masks: Masks, group: UnitGroup) -> torch.Tensor:
    """What the group itself keeps, `[sections, units]`."""
    if group.section_sizes:
        raise UserError(
            "--uniform: the model already has key-value groups of different sizes, which cannot be padded",
            remedy="leave --uniform out, or prune the original model in one step",
        )
    is_kept = masks.get(space.block(group).name, torch.ones(1)).all()
    return masks.get(group.name, torch.ones(group.size)).view(group.sections, -1) * float(is_kept)


def _sizes(
    source: ModelSource,
    space: PruningSpace,
    own: Mapping[str, torch.Tensor],
    groups: list[UnitGroup],
    wide: tuple[int | None, int | None],
) -> tuple[int, int]:
    """Sections, and units per section, of the largest group, or the next larger numbers that a stock class can load.

    `wide`: the hidden size and the dimensions per head, where they are masked.
    """
    first = groups[0]
    size = max(1, *(int(mask.sum(1).max()) for mask in own.values()))
    sections = first.sections
    if space.keys_of(first) is not None:
        sections = max(1, *(int(mask.amax(1).sum()) for mask in own.values()))
    for number in range(sections, first.sections + 1):
        for each in range(size, first.section_size + 1):
            if first.kind == "dimff":
                return number, each
            heads = (number * each, number) if first.head_unit == "query_head" else first.heads(each)
            if source.adapter.stock_holds(source.config, *heads, *wide):
                return number, each
    raise UserError(
        "--uniform: no transformers class can load these sizes in all layers",
        remedy="leave --uniform out: the folder then gets its own modeling file",
    )


def _filled(
    space: PruningSpace, group: UnitGroup, own: torch.Tensor, sections: int, size: int
) -> dict[str, torch.Tensor]:
    """The masks of a group and its keys with removed units put back, the first ones first, until the sizes are met."""
    used = own.amax(1)
    stays = used + (1 - used) * ((1 - used).cumsum(0) <= sections - used.sum())
    lacking = size - own.sum(1, keepdim=True)
    filled = (own + (1 - own) * ((1 - own).cumsum(1) <= lacking)) * stays[:, None]
    keys = space.keys_of(group)
    return {group.name: filled.flatten()} | ({keys.name: stays} if keys is not None else {})


def _read(tensors: Mapping[str, torch.Tensor], path: str, zeroed: Zeroed, is_empty: bool) -> torch.Tensor:
    tensor = tensors[path]
    if is_empty:
        return torch.zeros_like(tensor)
    for piece, units in zeroed:
        tensor = tensor.index_fill(piece.dim, piece.indices(units), 0)
    return tensor
