"""Masks carried out: smaller weights that compute exactly what the masked model computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from cook.base.errors import UserError
from cook.pruning.counts import weights_gone
from cook.pruning.mask_set import Masks, is_even
from cook.pruning.units import PruningSpace, WeightSlice


def kept_units(space: PruningSpace, masks: Masks) -> dict[str, tuple[int, ...]]:
    """The indices that every masked group keeps, ascending."""
    sizes = {group.name: group.size for group in space.groups}
    strange = [name for name, mask in masks.items() if len(mask) != sizes.get(name)]
    assert not strange, f"masks of no group of this model: {strange}"
    soft = [name for name, mask in masks.items() if not ((mask == 0) | (mask == 1)).all()]
    assert not soft, f"masks that are not yet 0 or 1: {soft}"
    return {name: tuple(mask.nonzero().flatten().tolist()) for name, mask in masks.items()}


def reshaped(
    tensors: Mapping[str, torch.Tensor], space: PruningSpace, masks: Masks
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the small model, one after the other; only one source tensor is in memory at a time.

    A matrix by whose input size the model divides at run time (`fan_in`) is multiplied by √(new/old) where it lost
    columns, for the product to stay what it was. A block whose heads or dims are all masked is dropped but for its
    residue, since all else that it adds to the residual stream is zero.

    Args:
        tensors: The masked model's weights, in the shapes of `space`.
        space: What the weights are.
        masks: 0/1 a unit, by group name.

    Raises:
        UserError: a weight is missing, left over, or of another shape than the model's config says.
    """
    missing, extra = [p for p in space.shapes if p not in tensors], [p for p in tensors if p not in space.shapes]
    if missing or extra:
        problem = f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} has no place in the model"
        raise UserError(f"the weights do not fit the model's config: {problem}")
    kept = kept_units(space, masks)
    cuts: dict[str, list[tuple[WeightSlice, tuple[int, ...]]]] = {}
    dropped: set[str] = set()
    for group in space.groups:
        if group.name not in kept:
            continue
        dropped |= weights_gone(space, group, len(kept[group.name]))
        if kept[group.name] and len(kept[group.name]) < group.size:
            assert is_even(group, masks[group.name]), f"{group.name} keeps more of one section than of another"
            removed = tuple(sorted(set(range(group.size)) - set(kept[group.name])))
            for piece in group.slices:
                cuts.setdefault(piece.path, []).append((piece, removed))
    for path in space.shapes:
        if path not in dropped:
            tensor = tensors[path]
            if tensor.shape != space.shapes[path]:
                got = f"shape {tuple(tensor.shape)}"
                raise UserError(f"the weight {path!r} is not the config's", wanted=space.shapes[path], got=got)
            yield path, _cut(tensor, cuts[path]) if path in cuts else tensor


def _cut(tensor: torch.Tensor, cuts: Sequence[tuple[WeightSlice, tuple[int, ...]]]) -> torch.Tensor:
    """Takes units away, all of a dimension at once: indices count in the whole tensor."""
    scale = 1.0
    for dim in sorted({piece.dim for piece, _ in cuts}):
        stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
        for piece, removed in cuts:
            if piece.dim == dim:
                starts = piece.offset + torch.tensor(removed) * piece.block
                stays[(starts[:, None] + torch.arange(piece.block)).flatten()] = False
        if any(piece.fan_in for piece, _ in cuts if piece.dim == dim):
            scale *= (int(stays.sum()) / len(stays)) ** 0.5
        tensor = tensor.index_select(dim, stays.nonzero().flatten())
    # In float64: the one rounding is that of the result.
    return tensor if scale == 1.0 else (tensor.double() * scale).to(tensor.dtype)
