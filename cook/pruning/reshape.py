"""Reshaping: smaller weights that compute exactly what the masked model computes, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from cook.base.errors import UserError
from cook.base.tensor_files import LazyTensors, in_parts
from cook.pruning.counts import shared_gone, weights_gone
from cook.pruning.mask_set import Masks, consistent, fits
from cook.pruning.units import WIDE, PruningSpace, WeightSlice

Cuts = Sequence[tuple[WeightSlice, tuple[int, ...], int]]
"""The slices of a weight that lose units, the indices of these units, and how many units there were."""


def kept_units(space: PruningSpace, masks: Masks) -> dict[str, tuple[int, ...]]:
    """The indices of the units that every masked group keeps, ascending."""
    sizes = {group.name: group.size for group in space.every}
    strange = [name for name, mask in masks.items() if len(mask) != sizes.get(name)]
    assert not strange, f"masks for groups that the model lacks: {strange}"
    soft = [name for name, mask in masks.items() if not ((mask == 0) | (mask == 1)).all()]
    assert not soft, f"masks that are not binary: {soft}"
    alone = [name for name, mask in consistent(space, masks).items() if not torch.equal(mask, masks.get(name, mask))]
    assert not alone, f"query heads without their keys, or keys that no query head reads: {alone}"
    uneven = [group.name for group in space.every if group.name in masks and not fits(group, masks[group.name])]
    assert not uneven, f"fewer units than must stay, or experts that keep different numbers: {uneven}"
    return {name: tuple(mask.nonzero().flatten().tolist()) for name, mask in masks.items()}


def reshaped(tensors: Mapping[str, torch.Tensor], space: PruningSpace, masks: Masks, *, moment: int = 0) -> LazyTensors:
    """The weights of the small model, each read and cut on access.

    If all heads or FFN dimensions of a block are masked, only its residue is kept, since everything else that it adds
    to the residual stream is zero.

    Args:
        tensors: The masked model's weights, in the shapes of `space`.
        space: The model's space.
        masks: 0/1 per unit, by group name.
        moment: 1 or 2 for an optimizer's means of gradients, or of their squares, in place of the weights.

    Raises:
        UserError: a weight is missing, unexpected, or (on access) has another shape than the config specifies.
    """
    missing, extra = [p for p in space.shapes if p not in tensors], [p for p in tensors if p not in space.shapes]
    if missing or extra:
        problem = f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} has no place in the model"
        raise UserError(
            f"the weights do not fit the model's config: {problem}", remedy="use the config.json of these weights"
        )
    dropped, cuts = _dropped_and_cut(space, masks)

    def small(path: str) -> torch.Tensor:
        tensor = tensors[path]
        if tensor.shape != space.shapes[path]:
            got = f"shape {tuple(tensor.shape)}"
            raise UserError(
                f"the weight {path!r} has another shape than in the config", wanted=space.shapes[path], got=got
            )
        return _cut(tensor, cuts[path], moment) if path in cuts else tensor

    return LazyTensors({path: partial(small, path) for path in space.shapes if path not in dropped})


def multiplied(space: PruningSpace, masks: Masks) -> set[str]:
    """The weights that `reshaped` multiplies by a factor, which rounds them again."""
    _, cuts = _dropped_and_cut(space, masks)
    return {path for path, pieces in cuts.items() if any(piece.power for piece, _, _ in pieces)}


def restored(
    small: Iterable[tuple[str, torch.Tensor]],
    tensors: Mapping[str, torch.Tensor],
    space: PruningSpace,
    masks: Masks,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of the whole model with those of a small one put back: the inverse of `reshaped`.

    Args:
        small: The small model's weights.
        tensors: The whole model's weights, which provide what the masks remove.
        space: The whole model's space.
        masks: 0/1 per unit, by group name.
        dtype: Type of the weights that the small model lacks entirely; None: as in `tensors`.
    """
    dropped, cuts = _dropped_and_cut(space, masks)
    for path, tensor in small:
        yield path, _put_back(tensor, tensors[path], cuts[path]) if path in cuts else tensor
    for path in sorted(dropped):
        tensor = tensors[path]
        yield path, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def filled_up(small: Mapping[str, torch.Tensor], space: PruningSpace, masks: Masks, *, moment: int = 0) -> LazyTensors:
    """The weights of the whole model on access, with 0 for everything that the masks remove.

    Args:
        small: The small model's weights.
        space: The whole model's space.
        masks: 0/1 per unit, by group name.
        moment: As for `reshaped`.
    """
    dropped, cuts = _dropped_and_cut(space, masks)

    def whole(path: str) -> torch.Tensor:
        if path not in dropped and path not in cuts:
            return small[path]
        zeros = torch.zeros(space.shapes[path])
        return zeros if path in dropped else _put_back(small[path], zeros, cuts[path], moment)

    found = [path for path in space.shapes if path in dropped or path in small]
    return LazyTensors({path: partial(whole, path) for path in found}, {path: space.shapes[path] for path in found})


def _dropped_and_cut(space: PruningSpace, masks: Masks) -> tuple[set[str], dict[str, Cuts]]:
    """The weights that are removed as a whole, and those that lose some units."""
    kept = kept_units(space, masks)
    cuts: dict[str, list[tuple[WeightSlice, tuple[int, ...], int]]] = {}
    dropped = shared_gone(space, {name: len(units) for name, units in kept.items()})
    assert all(kept.get(kind, (0,)) for kind in WIDE), "a model without any hidden or head dimensions"
    for group in space.every:
        if group.name not in kept:
            continue
        dropped |= weights_gone(space, group, len(kept[group.name]))
        if kept[group.name] and len(kept[group.name]) < group.size:
            removed = tuple(sorted(set(range(group.size)) - set(kept[group.name])))
            for piece in group.slices:
                cuts.setdefault(piece.path, []).append((piece, removed, group.size))
    return dropped, {path: pieces for path, pieces in cuts.items() if path not in dropped}


def _kept_indices(size: int, dim: int, cuts: Cuts) -> torch.Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    for piece, removed, _ in cuts:
        if piece.dim == dim:
            stays[piece.indices(removed)] = False
    return stays.nonzero().flatten()


def _stays(shape: torch.Size, cuts: Cuts) -> torch.Tensor:
    """Which entries of fused experts stay, of the same shape: each expert loses other dimensions."""
    stays = torch.ones(shape, dtype=torch.bool)
    for piece, removed, _ in cuts:
        units, by_dim = torch.tensor(removed), stays.movedim(piece.dim, 1 if piece.row_units else 0)
        for step in range(piece.block):
            if piece.row_units:
                by_dim[units // piece.row_units, piece.offset + units % piece.row_units * piece.block + step] = False
            else:
                by_dim[piece.offset + units * piece.block + step] = False
    return stays


def _put_back(tensor: torch.Tensor, whole: torch.Tensor, cuts: Cuts, moment: int = 0) -> torch.Tensor:
    whole = whole.to(tensor.device, tensor.dtype, copy=True)
    if any(piece.row_units for piece, _, _ in cuts):
        return whole.masked_scatter_(_stays(whole.shape, cuts).to(whole.device), tensor)
    indices = [torch.arange(size) for size in whole.shape]
    for dim in {piece.dim for piece, _, _ in cuts}:
        indices[dim] = _kept_indices(whole.shape[dim], dim, cuts)
        tensor = _scaled(tensor, dim, indices[dim], whole.shape[dim], cuts, moment, inverse=True)
    whole[torch.meshgrid(*indices, indexing="ij")] = tensor
    return whole


def _cut(tensor: torch.Tensor, cuts: Cuts, moment: int) -> torch.Tensor:
    """Removes units, all of one dimension at once; indices refer to the whole tensor."""
    if any(piece.row_units for piece, _, _ in cuts):
        stays = _stays(tensor.shape, cuts)
        experts = stays.flatten(1).any(1)
        one = stays[experts][0]
        rest = [
            int(one.movedim(dim, 0).flatten(1).any(1).sum()) if one.ndim > 1 else int(one.sum())
            for dim in range(one.ndim)
        ]
        return tensor[stays.to(tensor.device)].view(int(experts.sum()), *rest)
    for dim in sorted({piece.dim for piece, _, _ in cuts}):
        size = tensor.shape[dim]
        stays = _kept_indices(size, dim, cuts)
        tensor = _scaled(tensor.index_select(dim, stays.to(tensor.device)), dim, stays, size, cuts, moment)
    return tensor


def _scaled(
    tensor: torch.Tensor, dim: int, stays: torch.Tensor, size: int, cuts: Cuts, moment: int, *, inverse: bool = False
) -> torch.Tensor:
    """The tensor times the factors (`WeightSlice.power`) of what stays along one dimension of `size` indices.

    A weight that is f times as large has a gradient that is 1/f of the other.
    """
    pieces = [(piece, units - len(removed), units) for piece, removed, units in cuts if piece.dim == dim]
    factors = torch.ones(size, dtype=torch.float64)
    for piece, kept, units in pieces:
        if piece.power:
            factors[piece.all_indices(units)] *= piece.share(kept, units) ** piece.power
    if bool((factors == 1).all()):
        return tensor
    added = 0.0 if moment else max(piece.added for piece, _, _ in pieces)
    factors = factors[stays].view([-1 if axis == dim else 1 for axis in range(tensor.ndim)]).to(tensor.device)
    factors = factors**-moment if moment else factors
    # In float64, so that only the result is rounded.
    factors = 1 / factors if inverse else factors
    return in_parts(lambda part, factor: (part.double() + added) * factor - added, tensor, factors)
