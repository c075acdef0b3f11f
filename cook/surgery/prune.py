"""Masks carried out on disk: a model folder in, a small dense model folder out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from cook.adapters.source import ModelSource
from cook.base.errors import UserError
from cook.masks.mask_file import read_masks, write_mask_file
from cook.masks.mask_set import Masks, coarse_to_tensors, fine_to_tensors
from cook.space.units import PruningSpace
from cook.surgery.export import write_live_format, write_model_folder
from cook.surgery.gates import AttachedGates
from cook.surgery.reshape import kept_units, reshaped


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A reshaped model on disk."""

    folder: Path
    config: dict[str, Any]
    needs_remote_code: bool
    """False: a stock class loads it."""
    live_obstacle: str | None
    """Why the family's own format cannot hold it; None if that was written too, "" if it has no such format."""


def prune_to_folder(
    source: ModelSource, space: PruningSpace, masks: Masks, output: Path, *, record: Masks | None = None
) -> Pruned:
    """Reshapes a model tensor by tensor into `output`, which appears only when it is complete.

    Peak memory is one source tensor and one output shard.

    Args:
        source: The masked model.
        space: Its space.
        masks: 0/1 a unit, by group name.
        output: The folder to write; an earlier export there is replaced.
        record: Masks to keep in the folder in place of `masks`.
    """
    if output.resolve() in (source.path.resolve(), *source.path.resolve().parents):
        raise UserError(f"{output}: would overwrite the model it is made from", remedy="choose another --output")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file", remedy="choose another --output")
    if output.exists() and not (output / "config.json").exists() and any(output.iterdir()):
        raise UserError(f"{output}: holds something other than a model", remedy="choose another --output")
    aside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shrunk = source.adapter.shrink(source.config, space, kept_units(space, masks))
    tensors = ((shrunk.renamed.get(name, name), tensor) for name, tensor in reshaped(source.tensors, space, masks))
    try:
        write_model_folder(aside, source.adapter, shrunk.config, chain(tensors, source.carried.items()))
        obstacle = write_live_format(aside, source.adapter, shrunk.config, "cpm_live")
        record = masks if record is None else record
        write_mask_file(aside / "masks" / "coarse.pt", coarse_to_tensors(space, record))
        fine = _fine_if_even(space, record)
        if fine:
            write_mask_file(aside / "masks" / "fine.pt", fine)
        shutil.rmtree(output, ignore_errors=True)
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    needs_remote_code = source.adapter.modeling(shrunk.config) is not None
    return Pruned(
        folder=output, config=shrunk.config, needs_remote_code=needs_remote_code, live_obstacle=obstacle
    )


def reshaped_source(source: ModelSource, space: PruningSpace, masks: Masks) -> ModelSource:
    """The same in memory: the small model's config and weights."""
    shrunk = source.adapter.shrink(source.config, space, kept_units(space, masks))
    tensors = {shrunk.renamed.get(name, name): tensor for name, tensor in reshaped(source.tensors, space, masks)}
    return replace(source, config=shrunk.config, tensors=tensors)


def open_masks(
    source: ModelSource, *, coarse: str | None = None, heads: str | None = None, dimff: str | None = None
) -> tuple[PruningSpace, dict[str, torch.Tensor]]:
    """The masks in some files, and the model's space with the units of attention that they speak of.

    Raises:
        UserError: a file that is not a mask, is another model's, or contradicts another one.
    """
    spaces = [source.adapter.space(source.config, unit) for unit in source.adapter.head_units(source.config)]
    problem: UserError | None = None
    for space in spaces:
        try:
            return space, read_masks(space, coarse=coarse, heads=heads, dimff=dimff)
        except UserError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _fine_if_even(space: PruningSpace, masks: Masks) -> dict[str, torch.Tensor]:
    # The masks in the folder are a record; a model that was ragged before has no file layout to be recorded in.
    try:
        return fine_to_tensors(space, masks)
    except UserError:
        return {}


def mask_model(model: torch.nn.Module, space: PruningSpace, masks: Mapping[str, torch.Tensor]) -> AttachedGates:
    """Attaches fixed masks to a whole model."""
    return AttachedGates(model, [group for group in space.groups if group.name in masks], masks)
