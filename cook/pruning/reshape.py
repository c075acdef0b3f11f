"""Reshaping: smaller weights that compute exactly what the masked model computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from cook.base.errors import UserError
from cook.pruning.counts import weights_gone
from cook.pruning.mask_set import Masks, is_even
from cook.pruning.units import PruningSpace, WeightSlice


def kept_units(space: PruningSpace, masks: Masks) -> dict[str, tuple[int, ...]]:
    """The indices of the units that every masked group keeps, ascending."""
    sizes = {group.name: group.size for group in space.groups}
    strange = [name for name, mask in masks.items() if len(mask) != sizes.get(name)]
    assert not strange, f"masks for groups that the model lacks: {strange}"
    soft = [name for name, mask in masks.items() if not ((mask == 0) | (mask == 1)).all()]
    assert not soft, f"masks that are not binary: {soft}"
    return {name: tuple(mask.nonzero().flatten().tolist()) for name, mask in masks.items()}


def reshaped(
    tensors: Mapping[str, torch.Tensor], space: PruningSpace, masks: Masks
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of the small model one by one; only one source tensor is in memory at a time.

    If the model divides by the input size of a matrix at run time (`fan_in`) and the matrix lost columns, it is
    multiplied by √(new/old) to keep the product the same. If all heads or FFN dimensions of a block are masked, only
    its residue is kept, since everything else that it adds to the residual stream is zero.

    Args:
        tensors: The masked model's weights, in the shapes of `space`.
        space: The model's space.
        masks: 0/1 per unit, by group name.

    Raises:
        UserError: a weight is missing, unexpected, or has another shape than the config specifies.
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
                raise UserError(
                    f"the weight {path!r} has another shape than in the config", wanted=space.shapes[path], got=got
                )
            yield path, _cut(tensor, cuts[path]) if path in cuts else tensor


def _cut(tensor: torch.Tensor, cuts: Sequence[tuple[WeightSlice, tuple[int, ...]]]) -> torch.Tensor:
    """Removes units, all of one dimension at once; indices refer to the whole tensor."""
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
    # In float64, so that only the result is rounded.
    return tensor if scale == 1.0 else (tensor.double() * scale).to(tensor.dtype)
