"""Models to compare a reshaped one with: those that transformers loads, rather than cook's own reading of the files."""

from __future__ import annotations

from pathlib import Path

import torch

from cook.base.tensor_files import read_model_config
from cook.export.check import quiet, transformers_class
from cook.export.pruned_folder import mask_model
from cook.families.source import load_model, open_model
from cook.pruning.family import ModelSource
from cook.pruning.mask_set import Masks
from cook.pruning.units import PruningSpace


def masked_model(
    source: ModelSource, space: PruningSpace, masks: Masks, dtype: torch.dtype
) -> tuple[torch.nn.Module, str]:
    """The whole model with its masked units at zero, and a word on who loaded it.

    Transformers loads it from the folder with its own class, and the weights of the masked units are set to zero. Only
    a family that transformers does not hold, or weights outside of a folder, are read and masked by cook.
    """
    found = transformers_class(source.config) if (source.path / "config.json").is_file() else None
    if found is None:
        model = load_model(source, dtype)
        mask_model(model, space, masks)
        return model, "the model as cook reads and masks it"
    model = _loaded(source.path, found[0], dtype)
    zero_units(model, space, masks)
    return model, f"transformers' {found[0].__name__} with the masked units set to zero"


def written_model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """A reshaped model as its users load it."""
    found = transformers_class(read_model_config(folder))
    return load_model(open_model(folder), dtype) if found is None else _loaded(folder, found[0], dtype)


def _loaded(folder: Path, made: type, dtype: torch.dtype) -> torch.nn.Module:
    with quiet():
        # A config may name another way of attention, which would be fetched from a hub.
        model: torch.nn.Module = made.from_pretrained(  # type: ignore[attr-defined]
            folder,
            dtype=dtype,
            attn_implementation="sdpa" if made._supports_sdpa else "eager",  # type: ignore[attr-defined]
        )
    return model.eval()


@torch.no_grad()
def zero_units(model: torch.nn.Module, space: PruningSpace, masks: Masks) -> None:
    """Sets the weights that take masked units to the residual stream to zero; of a masked block its biases too."""
    weights = dict(model.named_parameters())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def weight(path: str) -> torch.Tensor:
        return next(weights[p] for p in (path, path.removeprefix(prefix), prefix + path) if p in weights)

    lasts = {(g.site, g.layer): g.slices[-1] for g in (*space.groups, *space.unprunable) if g.kind != "layer"}
    for group in space.groups:
        mask = masks.get(group.name)
        if mask is None or mask.all():
            continue
        last = lasts[group.site, group.layer]
        if group.kind == "layer":
            weight(last.path).zero_()
            for path in group.residue:
                if path.endswith(".bias"):
                    weight(path).zero_()
        else:
            kept = mask.repeat_interleave(last.block)
            shape = [-1 if dim == last.dim else 1 for dim in range(2)]
            weight(last.path).mul_(kept.view(shape))
