"""Binary masks by group, and their layout in the guide's files: row r of a fine mask belongs to the r-th kept block.

A `Masks` mapping holds, for a group's name, a float32 tensor of 0 (removed) and 1 (kept); absent groups keep all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cook.base.errors import UserError
from cook.config.kinds import FINE
from cook.pruning.units import WIDE, PruningSpace, UnitGroup

Masks = Mapping[str, torch.Tensor]
COARSE_KEYS = ("self_att_layer_z", "cross_att_layer_z", "ffn_layer_z")
FINE_KEYS: dict[str, str] = {kind: names.tensor for kind, names in FINE.items()}
"""The tensors of a fine mask file, by kind."""
WIDE_NAMES = {"head_dims": "the size of heads", "hidden": "the hidden size"}


def kept_counts(masks: Masks) -> dict[str, int]:
    """How many units each masked group keeps."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def kept_groups(space: PruningSpace, masks: Masks, kind: str) -> list[UnitGroup]:
    """The `heads` or `dimff` groups that may be pruned and whose block is kept, from the bottom up."""
    return _of_kept_blocks(space, masks, [g for g in space.groups if g.kind == kind])


def _rows(space: PruningSpace, masks: Masks, kind: str) -> list[UnitGroup]:
    """The groups of a fine file's rows; groups that must not be pruned have rows too."""
    unprunable = [g for g in space.unprunable if g.kind == kind]
    return _of_kept_blocks(space, masks, sorted((*kept_groups(space, masks, kind), *unprunable), key=lambda g: g.layer))


def _of_kept_blocks(space: PruningSpace, masks: Masks, groups: Sequence[UnitGroup]) -> list[UnitGroup]:
    return [g for g in groups if bool(masks.get(space.block(g).name, torch.ones(1)).all())]


def without_empty_blocks(space: PruningSpace, masks: Masks) -> dict[str, torch.Tensor]:
    """The same masks, in which a block without any kept unit counts as removed.

    An exception is a block whose bias, or the norm after it, still acts without units: it keeps a row of zeros.
    """
    empty = [g for g in space.groups if g.kind != "layer" and g.name in masks and not masks[g.name].any()]
    blocks = [space.block(group) for group in empty]
    return {**masks, **{block.name: torch.zeros(1) for block in blocks if not block.residue}}


def consistent(space: PruningSpace, masks: Masks) -> dict[str, torch.Tensor]:
    """The same masks, in which a key-value head goes with the last of its query heads, and query heads with theirs."""
    made = dict(masks)
    for heads in space.of("heads"):
        keys = space.keys_of(heads)
        if keys is None or not (heads.name in masks or keys.name in masks):
            continue
        own = masks.get(heads.name, torch.ones(heads.size)).split(heads.spans)
        kept = masks.get(keys.name, torch.ones(keys.size)) * torch.tensor([float(part.any()) for part in own])
        if keys.name in masks or not kept.all():
            made[keys.name] = kept
            made[heads.name] = torch.cat([part * z for part, z in zip(own, kept, strict=True)])
    return made


def fits(group: UnitGroup, mask: torch.Tensor) -> bool:
    """Whether a mask leaves as many units of each section as must stay, and of experts the same number in each."""
    kept = {int(part.sum()) for part in mask.split(group.spans)}
    return min(kept) >= group.least and not (group.is_even and len(kept) > 1)


def coarse_to_tensors(space: PruningSpace, masks: Masks) -> dict[str, torch.Tensor]:
    """The coarse file's content: one number per layer and site; 0 also if the model has no such block."""
    tensors = {"self_att_layer_z": torch.zeros(space.num_layers), "ffn_layer_z": torch.zeros(space.num_layers)}
    unprunable = [group for group in space.unprunable if group.kind == "layer"]
    for group in (*space.of("layer"), *unprunable):
        key = "self_att_layer_z" if group.site == "att" else "ffn_layer_z"
        tensors[key][group.layer] = float(masks.get(group.name, torch.ones(1)))
    return {
        "self_att_layer_z": tensors["self_att_layer_z"],
        "cross_att_layer_z": torch.zeros(0),
        "ffn_layer_z": tensors["ffn_layer_z"],
    }


def coarse_from_tensors(
    space: PruningSpace, tensors: Mapping[str, torch.Tensor], source: str
) -> dict[str, torch.Tensor]:
    """Converts a coarse file's content to block masks by group name.

    Raises:
        UserError: the number of layers does not match, or the mask keeps a block that the model lacks, or removes
            one that must stay.
    """
    masks: dict[str, torch.Tensor] = {}
    cross = tensors.get("cross_att_layer_z", torch.zeros(0))
    if cross.shape not in ((0,), (space.num_layers,)):
        raise UserError(
            f"{source}: cross_att_layer_z is not this model's",
            wanted=f"shape (0,) or ({space.num_layers},)",
            got=f"shape {tuple(cross.shape)}",
        )
    for key, site in (("self_att_layer_z", "att"), ("ffn_layer_z", "ffn")):
        column = tensors[key]
        if column.shape != (space.num_layers,):
            raise UserError(
                f"{source}: {key} is not this model's",
                wanted=f"{space.num_layers} layers",
                got=f"shape {tuple(column.shape)}",
            )
        present = {g.layer: g for g in space.of("layer") if g.site == site}
        whole = {g.layer for g in space.unprunable if (g.kind, g.site) == ("layer", site)}
        for layer, z in enumerate(column.tolist()):
            if layer in present:
                masks[present[layer].name] = torch.tensor([z])
            elif layer in whole and not z:
                raise UserError(f"{source}: {key} removes layer {layer}'s block, which pruned_module does not allow")
            elif layer not in whole and z:
                raise UserError(f"{source}: {key} keeps layer {layer}'s block, which the model lacks")
    return masks


def fine_to_tensors(space: PruningSpace, masks: Masks) -> dict[str, torch.Tensor]:
    """The fine file's content, for the kinds in `masks`: `heads_z`, `experts_z`, `dimff_z`, `head_dims_z` (one number
    per pair of dimensions that rotary positions turn, or per dimension), `hidden_z` (one number per hidden dimension).

    All rows are as long as that of the largest block; those of smaller ones end in 0.
    """
    tensors: dict[str, torch.Tensor] = {}
    for kind, key in FINE_KEYS.items():
        if kind in WIDE:
            tensors |= {key: masks[kind]} if kind in masks else {}
            continue
        groups = _rows(space, masks, kind)
        masked = [g for g in space.groups if g.kind == kind and g.name in masks]
        if masked:
            longest = max(g.size * g.members for g in groups or masked)
            tensors[key] = torch.zeros(len(groups), longest)
            for row, g in zip(tensors[key], groups, strict=True):
                row[: g.size * g.members] = masks.get(g.name, torch.ones(g.size)).repeat_interleave(g.members)
    return tensors


def fine_from_tensors(
    space: PruningSpace, block_masks: Masks, tensors: Mapping[str, torch.Tensor], kind: str, source: str
) -> dict[str, torch.Tensor]:
    """Converts a fine file's content to the masks of one kind, by group name.

    Args:
        space: The model's space.
        block_masks: The coarse masks, which define the block of each row.
        tensors: The file's content.
        kind: `heads`, `experts`, `dimff`, `head_dims` or `hidden`.
        source: The file's name, for errors.

    Raises:
        UserError: the rows belong to another model or another coarse mask, prune a group that must stay whole, or
            separate units that must be pruned together.
    """
    if kind in WIDE:
        return {kind: _wide_mask(space, kind, tensors[FINE_KEYS[kind]], source)}
    rows, groups = tensors[FINE_KEYS[kind]], _rows(space, block_masks, kind)
    sizes = sorted({group.size * group.members for group in groups or space.groups if group.kind == kind})
    fits_model = bool(sizes) and rows.shape == (len(groups), sizes[-1])
    if not fits_model or any(row[g.size * g.members :].any() for row, g in zip(rows, groups, strict=True)):
        raise UserError(
            f"{source}: {FINE_KEYS[kind]} does not fit the model and its coarse mask",
            wanted=f"{len(groups)} kept blocks × {sizes[-1] if sizes else 'no'} units"
            + (", 0 behind those of smaller blocks" if len(sizes) > 1 else ""),
            got=f"shape {tuple(rows.shape)}",
            remedy="give the coarse mask that this mask was trained with",
        )
    masks = {group.name: _units(group, row, source) for group, row in zip(groups, rows, strict=True)}
    for group in groups:
        if not fits(group, masks[group.name]):
            raise UserError(
                f"{source}: {FINE_KEYS[kind]} keeps too few units of {group.name}, or experts of different sizes",
                wanted=f"at least {group.least} of every {max(group.spans)}"
                + (", and the same number of each" if group.is_even else ""),
            )
        if group in space.unprunable and not masks.pop(group.name).all():
            raise UserError(f"{source}: {FINE_KEYS[kind]} prunes {group.name}, which pruned_module does not allow")
    return masks


def _wide_mask(space: PruningSpace, kind: str, mask: torch.Tensor, source: str) -> torch.Tensor:
    size = next((group.size for group in space.every if group.name == kind), 0)
    if mask.shape != (size,) or not mask.any():
        raise UserError(
            f"{source}: {FINE_KEYS[kind]} does not fit the model",
            wanted=f"shape ({size},), not all 0" if size else f"no such mask: {WIDE_NAMES[kind]} must stay",
            got=f"shape {tuple(mask.shape)}",
        )
    return mask.clone()


def _units(group: UnitGroup, row: torch.Tensor, source: str) -> torch.Tensor:
    """The mask value of each unit, from the values of its members."""
    by_unit = row[: group.size * group.members].view(group.size, group.members)
    if not (by_unit == by_unit[:, :1]).all():
        raise UserError(
            f"{source}: {group.name} keeps only a part of a key-value group",
            wanted=f"the {group.members} query heads of a group kept or removed together",
            remedy='give a mask of whole groups, or set fine-grained.head_unit to "query_head"',
        )
    return by_unit[:, 0].clone()
