"""Binary masks by group, and the guide's layout of them: row r of a fine mask belongs to the r-th kept block.

A `Masks` mapping holds, for a group's name, a float32 tensor of 0 (removed) and 1 (kept); absent groups keep all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cook.base.errors import UserError
from cook.pruning.units import PruningSpace, UnitGroup

Masks = Mapping[str, torch.Tensor]
COARSE_KEYS = ("self_att_layer_z", "cross_att_layer_z", "ffn_layer_z")
FINE_KEYS = {"heads": "heads_z", "dimff": "dimff_z"}


def kept_counts(masks: Masks) -> dict[str, int]:
    """How many units each masked group keeps."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def kept_groups(space: PruningSpace, masks: Masks, kind: str) -> list[UnitGroup]:
    """The `heads` or `dimff` groups that may be pruned and whose block is kept, from the bottom up."""
    return _of_kept_blocks(space, masks, [g for g in space.groups if g.kind == kind])


def _rows(space: PruningSpace, masks: Masks, kind: str) -> list[UnitGroup]:
    """The groups of a fine file's rows: those that must stay whole have theirs as well."""
    unprunable = [g for g in space.unprunable if g.kind == kind]
    return _of_kept_blocks(space, masks, sorted((*kept_groups(space, masks, kind), *unprunable), key=lambda g: g.layer))


def _of_kept_blocks(space: PruningSpace, masks: Masks, groups: Sequence[UnitGroup]) -> list[UnitGroup]:
    return [g for g in groups if bool(masks.get(space.block(g).name, torch.ones(1)).all())]


def without_empty_blocks(space: PruningSpace, masks: Masks) -> dict[str, torch.Tensor]:
    """The same masks, a block of which no unit is left counting as removed.

    Not so a block whose bias (or whose norm behind it) acts on without units: it keeps a row of zeros.
    """
    empty = [g for g in space.groups if g.kind != "layer" and g.name in masks and not masks[g.name].any()]
    blocks = [space.block(group) for group in empty]
    return {**masks, **{block.name: torch.zeros(1) for block in blocks if not block.residue}}


def coarse_to_tensors(space: PruningSpace, masks: Masks) -> dict[str, torch.Tensor]:
    """The coarse file's content: one number a layer and site, 0 also where the model has no such block."""
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
    """Block masks by group name from a coarse file's content.

    Raises:
        UserError: the number of layers is another model's, or the mask keeps a block that the model lacks, or removes
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
    """The fine file's content: `heads_z`, `dimff_z` or both, whichever kinds `masks` holds.

    Raises:
        UserError: blocks have different numbers of units, which the layout cannot hold.
    """
    tensors = {}
    for kind, key in FINE_KEYS.items():
        groups = _rows(space, masks, kind)
        masked = [g for g in space.groups if g.kind == kind and g.name in masks]
        if masked:
            sizes = {g.size * g.members for g in groups or masked}
            if len(sizes) > 1:
                raise UserError(f"{key}: the model's blocks have different sizes, which a mask file cannot hold")
            rows = [masks.get(g.name, torch.ones(g.size)).repeat_interleave(g.members) for g in groups]
            tensors[key] = torch.stack(rows) if rows else torch.zeros(0, sizes.pop())
    return tensors


def fine_from_tensors(
    space: PruningSpace, block_masks: Masks, tensors: Mapping[str, torch.Tensor], kind: str, source: str
) -> dict[str, torch.Tensor]:
    """Masks of one kind by group name from a fine file's content.

    Args:
        space: The model's space.
        block_masks: The coarse masks, which say to which blocks the rows belong.
        tensors: The file's content.
        kind: `heads` or `dimff`.
        source: The file's name, for errors.

    Raises:
        UserError: the rows are another model's, or belong to another coarse mask, or prune what must stay whole, or
            tear units apart that only go together.
    """
    rows, groups = tensors[FINE_KEYS[kind]], _rows(space, block_masks, kind)
    sizes = sorted({group.size * group.members for group in groups or space.groups if group.kind == kind})
    if len(sizes) != 1 or rows.shape != (len(groups), sizes[0]):
        raise UserError(
            f"{source}: {FINE_KEYS[kind]} does not fit the model and its coarse mask",
            wanted=f"{len(groups)} kept blocks × {' or '.join(map(str, sizes)) or 'no'} units",
            got=f"shape {tuple(rows.shape)}",
            remedy="give the coarse mask with which this mask was trained",
        )
    masks = {group.name: _units(group, row, source) for group, row in zip(groups, rows, strict=True)}
    for group in groups:
        if group in space.unprunable and not masks.pop(group.name).all():
            raise UserError(f"{source}: {FINE_KEYS[kind]} prunes {group.name}, which pruned_module does not allow")
    return masks


def _units(group: UnitGroup, row: torch.Tensor, source: str) -> torch.Tensor:
    """A unit's number from those of its members."""
    by_unit = row.view(group.size, group.members)
    if not (by_unit == by_unit[:, :1]).all():
        raise UserError(
            f"{source}: {group.name} keeps a part of a key-value group",
            wanted=f"the {group.members} query heads of a group kept or removed together",
            remedy="or give a mask that removes as many query heads of every group",
        )
    mask = by_unit[:, 0].clone()
    if not is_even(group, mask):
        raise UserError(
            f"{source}: {group.name} keeps more query heads of one key-value group than of another",
            wanted=f"as many of each of the {group.sections} groups",
        )
    return mask


def is_even(group: UnitGroup, mask: torch.Tensor) -> bool:
    """Whether every section of the group keeps as many units."""
    return len(set(mask.view(group.sections, -1).sum(1).tolist())) == 1
