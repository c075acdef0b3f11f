"""Reshaping on disk: reads a model folder and masks, writes a small dense model folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from cook.base.errors import UserError
from cook.base.tensor_files import LazyTensors, read_model_config
from cook.export.check import Account, account, auto_class, check_folder, transformers_class
from cook.export.model_folder import published, write_live_format, write_model_folder
from cook.pruning.attach import AttachedGates
from cook.pruning.family import ModelSource, Stored
from cook.pruning.mask_file import read_masks, write_mask_file
from cook.pruning.mask_set import Masks, coarse_to_tensors, fine_to_tensors
from cook.pruning.reshape import kept_units, reshaped
from cook.pruning.units import PruningSpace


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A reshaped model on disk."""

    folder: Path
    config: dict[str, Any]
    auto_class: str
    """The transformers class that loads it, such as `AutoModelForCausalLM`."""
    needs_remote_code: bool
    """Whether loading needs `trust_remote_code=True`; False if a stock class loads it."""
    live_obstacle: str | None
    """Why the family's own format cannot store it; None if it was written, "" if there is no such format."""
    account: Account
    """How the tensors that the family does not prune were handled."""


def prune_to_folder(
    source: ModelSource, space: PruningSpace, masks: Masks, output: Path, *, record: Masks | None = None
) -> Pruned:
    """Reshapes a model tensor by tensor into `output`, which appears only once it is complete and checked.

    Peak memory is one source tensor and one output shard. An earlier export at `output` is replaced.

    Args:
        source: The masked model.
        space: The model's space.
        masks: 0/1 per unit, by group name.
        output: The folder to write.
        record: Masks to store in the folder instead of `masks`.

    Raises:
        UserError: a weight has no place in the result, or `output` must not be replaced.
        RunFailed: a file cannot be written or read.
    """
    with published(output, source=source.path) as folder:
        pruned = write_pruned(source, space, masks, folder, record=record)
    return replace(pruned, folder=output)


def write_pruned(
    source: ModelSource, space: PruningSpace, masks: Masks, folder: Path, *, record: Masks | None = None
) -> Pruned:
    """Reshapes a model tensor by tensor into a new folder, and checks that every weight has its place there."""
    found = account(source, space)
    if "hidden" in masks and not masks["hidden"].all():
        found = replace(found, carried=(), outgrown=found.carried)
    kept = kept_units(space, masks)
    shrunk = source.adapter.shrink(source.config, space, kept)
    config = shrunk.config if found.outgrown else _with_architecture(shrunk.config, source.config)
    files = source.stored or source.tensors
    native = LazyTensors(
        {name: partial(source.tensors.__getitem__, name) for name in source.tensors if name in space.shapes}
    )
    tensors = ((shrunk.renamed.get(name, name), tensor) for name, tensor in reshaped(native, space, masks).items())
    carried = ((name, files[name]) for name in found.carried)
    write_model_folder(folder, source.adapter, config, chain(tensors, carried))
    obstacle = write_live_format(folder, source.adapter, config, "cpm_live")
    record = masks if record is None else record
    write_mask_file(folder / "masks" / "coarse.pt", coarse_to_tensors(space, record))
    if fine := fine_to_tensors(space, record):
        write_mask_file(folder / "masks" / "fine.pt", fine)
    check_folder(folder, source, space, {name: len(units) for name, units in kept.items()}, shrunk.renamed, found)
    return Pruned(
        folder=folder,
        config=config,
        auto_class=auto_class(read_model_config(folder)),
        needs_remote_code=source.adapter.modeling(config) is not None,
        live_obstacle=obstacle,
        account=found,
    )


def _with_architecture(config: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    # A head that is copied unchanged keeps its class, since the file has everything that the class needs.
    named = before.get("architectures") or []
    if config["model_type"] == before["model_type"] and transformers_class(before) is not None:
        return config | {"architectures": list(named)}
    return config


def reshaped_source(source: ModelSource, space: PruningSpace, masks: Masks) -> ModelSource:
    """The small model's config, and its weights, each cut on access."""
    shrunk = source.adapter.shrink(source.config, space, kept_units(space, masks))
    small = reshaped(source.tensors, space, masks)
    tensors = LazyTensors({shrunk.renamed.get(name, name): partial(small.__getitem__, name) for name in small})
    return replace(source, config=shrunk.config, tensors=tensors, stored=Stored({}))


def open_masks(
    source: ModelSource,
    *,
    coarse: str | None = None,
    heads: str | None = None,
    experts: str | None = None,
    dimff: str | None = None,
    head_dims: str | None = None,
    hidden: str | None = None,
) -> tuple[PruningSpace, dict[str, torch.Tensor]]:
    """Reads the masks in some files; returns them with the model's space in their attention units.

    Raises:
        UserError: a file is not a mask file, belongs to another model, or contradicts another file.
    """
    spaces = [source.adapter.space(source.config, unit) for unit in source.adapter.head_units(source.config)]
    problem: UserError | None = None
    for space in spaces:
        try:
            masks = read_masks(
                space, coarse=coarse, heads=heads, experts=experts, dimff=dimff, head_dims=head_dims, hidden=hidden
            )
            return space, masks
        except UserError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def mask_model(model: torch.nn.Module, space: PruningSpace, masks: Mapping[str, torch.Tensor]) -> AttachedGates:
    """Attaches fixed masks to a whole model."""
    return AttachedGates(model, [group for group in space.every if group.name in masks], masks)
