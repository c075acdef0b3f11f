"""Reshaping: smaller weights that compute exactly what the masked model computes, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from cook.base.errors import UserError
from cook.base.tensor_files import LazyTensors
from cook.pruning.counts import shared_gone, weights_gone
from cook.pruning.mask_set import Masks, consistent
from cook.pruning.units import PruningSpace, WeightSlice

Cuts = Sequence[tuple[WeightSlice, tuple[int, ...]]]
"""The slices of a weight that lose units, and the indices of these units."""


def kept_units(space: PruningSpace, masks: Masks) -> dict[str, tuple[int, ...]]:
    """The indices of the units that every masked group keeps, ascending."""
    sizes = {group.name: group.size for group in space.every}
    strange = [name for name, mask in masks.items() if len(mask) != sizes.get(name)]
    assert not strange, f"masks for groups that the model lacks: {strange}"
    soft = [name for name, mask in masks.items() if not ((mask == 0) | (mask == 1)).all()]
    assert not soft, f"masks that are not binary: {soft}"
    alone = [name for name, mask in consistent(space, masks).items() if not torch.equal(mask, masks.get(name, mask))]
    assert not alone, f"query heads without their keys, or keys that no query head reads: {alone}"
    return {name: tuple(mask.nonzero().flatten().tolist()) for name, mask in masks.items()}


def reshaped(
    tensors: Mapping[str, torch.Tensor], space: PruningSpace, masks: Masks, *, rescale: bool = True
) -> LazyTensors:
    """The weights of the small model, each read and cut on access.

    If the model divides by the input size of a matrix at run time (`fan_in`) and the matrix lost columns, it is
    multiplied by √(new/old) to keep the product the same. If all heads or FFN dimensions of a block are masked, only
    its residue is kept, since everything else that it adds to the residual stream is zero.

    Args:
        tensors: The masked model's weights, in the shapes of `space`.
        space: The model's space.
        masks: 0/1 per unit, by group name.
        rescale: False if the small model divides by the old input sizes (`fan_in_sizes`).

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
        return _cut(tensor, cuts[path], rescale) if path in cuts else tensor

    return LazyTensors({path: partial(small, path) for path in space.shapes if path not in dropped})


def restored(
    small: Iterable[tuple[str, torch.Tensor]],
    tensors: Mapping[str, torch.Tensor],
    space: PruningSpace,
    masks: Masks,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of the whole model with those of a small one put back: the inverse of `reshaped`.

    Args:
        small: The small model's weights, which were cut without `rescale`.
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


def filled_up(small: Mapping[str, torch.Tensor], space: PruningSpace, masks: Masks) -> LazyTensors:
    """The weights of the whole model on access, with 0 for everything that the masks remove.

    Args:
        small: The small model's weights, which were cut without `rescale`.
        space: The whole model's space.
        masks: 0/1 per unit, by group name.
    """
    dropped, cuts = _dropped_and_cut(space, masks)

    def whole(path: str) -> torch.Tensor:
        if path not in dropped and path not in cuts:
            return small[path]
        zeros = torch.zeros(space.shapes[path])
        return zeros if path in dropped else _put_back(small[path], zeros, cuts[path])

    return LazyTensors({path: partial(whole, path) for path in space.shapes if path in dropped or path in small})


def fan_in_sizes(space: PruningSpace) -> dict[str, int]:
    """The number by whose square root a module divides, by the module's path: its input size before any cut."""
    pieces = [piece for group in space.every for piece in group.slices if piece.fan_in]
    return {piece.path.removesuffix(".weight"): space.shapes[piece.path][piece.dim] for piece in pieces}


def _dropped_and_cut(space: PruningSpace, masks: Masks) -> tuple[set[str], dict[str, Cuts]]:
    """The weights that are removed as a whole, and those that lose some units."""
    kept = kept_units(space, masks)
    cuts: dict[str, list[tuple[WeightSlice, tuple[int, ...]]]] = {}
    dropped = shared_gone(space, {name: len(units) for name, units in kept.items()})
    assert kept.get("hidden", (0,)), "a model without hidden dimensions"
    for group in space.every:
        if group.name not in kept:
            continue
        dropped |= weights_gone(space, group, len(kept[group.name]))
        if kept[group.name] and len(kept[group.name]) < group.size:
            removed = tuple(sorted(set(range(group.size)) - set(kept[group.name])))
            for piece in group.slices:
                cuts.setdefault(piece.path, []).append((piece, removed))
    return dropped, {path: pieces for path, pieces in cuts.items() if path not in dropped}


def _kept_indices(size: int, dim: int, cuts: Cuts) -> torch.Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    for piece, removed in cuts:
        if piece.dim == dim:
            starts = piece.offset + torch.tensor(removed) * piece.block
            stays[(starts[:, None] + torch.arange(piece.block)).flatten()] = False
    return stays.nonzero().flatten()


def _put_back(tensor: torch.Tensor, whole: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    whole = whole.to(tensor.dtype, copy=True)
    indices = [torch.arange(size) for size in whole.shape]
    scale = 1.0
    for dim in {piece.dim for piece, _ in cuts}:
        indices[dim] = _kept_indices(whole.shape[dim], dim, cuts)
        scale /= _scale(len(indices[dim]), whole.shape[dim], dim, cuts, rescale=False)
    whole[torch.meshgrid(*indices, indexing="ij")] = _scaled(tensor, scale, cuts)
    return whole


def _cut(tensor: torch.Tensor, cuts: Cuts, rescale: bool) -> torch.Tensor:
    """Removes units, all of one dimension at once; indices refer to the whole tensor."""
    scale = 1.0
    for dim in sorted({piece.dim for piece, _ in cuts}):
        stays = _kept_indices(tensor.shape[dim], dim, cuts)
        scale *= _scale(len(stays), tensor.shape[dim], dim, cuts, rescale)
        tensor = tensor.index_select(dim, stays)
    return _scaled(tensor, scale, cuts)


def _scale(new: int, old: int, dim: int, cuts: Cuts, rescale: bool) -> float:
    """The factor of a weight that keeps `new` of `old` indices of a dimension; without `rescale`, but for fan-in."""
    pieces = [piece for piece, _ in cuts if piece.dim == dim]
    power = max((piece.power for piece in pieces), key=abs)
    return float((new / old) ** (power + 0.5 * (rescale and any(piece.fan_in for piece in pieces))))


def _scaled(tensor: torch.Tensor, scale: float, cuts: Cuts) -> torch.Tensor:
    if scale == 1.0:
        return tensor
    added = max(piece.added for piece, _ in cuts)
    # In float64, so that only the result is rounded.
    return ((tensor.double() + added) * scale - added).to(tensor.dtype)
