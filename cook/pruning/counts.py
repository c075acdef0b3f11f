"""Parameters and FLOPs of a pruning space under masks."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from cook.pruning.units import WIDE, PruningSpace, UnitGroup, WeightSlice

Kept = Mapping[str, int]
"""Units that each group keeps, by group name; a group that is not named keeps all."""


def unit_parameters(space: PruningSpace, group: UnitGroup) -> int:
    """Parameters removed with one unit of `group`, everything else kept."""
    return sum(_owned(space, piece) for piece in group.slices)


def _owned(space: PruningSpace, piece: WeightSlice) -> int:
    """Entries of a weight that one unit owns."""
    shape, own = space.shapes[piece.path], piece.block * piece.repeats
    if not shape:
        return own  # a buffer may be a single number, without any dimension
    return prod(shape) // shape[piece.dim] // (shape[0] if piece.row_units else 1) * own


def is_product(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight is a matrix by which every token is multiplied; the biases of fused experts and norms over every
    head have two dimensions too.
    """
    return len(shape) == 2 and not path.endswith(("proj_bias", "norm.weight"))


def unit_flops(space: PruningSpace, group: UnitGroup, *, context: int) -> int:
    """FLOPs per token of the forward pass that one head or FFN dimension costs, everything else kept.

    2 per weight of its matrix products; for heads also 4 per feature and key, for the score and the weighted sum. Each
    token is computed by the same number of experts, however many there are.

    Args:
        space: The pruning space.
        group: The unit's group.
        context: Mean number of keys that a query attends to.
    """
    flops = sum(2 * _owned(space, s) for s in group.slices if is_product(s.path, space.shapes[s.path]))
    if group.active and group.kind == "dimff":
        inside = sum(2 * _owned(space, s) for s in group.slices if len(space.shapes[s.path]) == 3)
        flops = inside * group.active // group.sections
    return flops + (4 * context * group.slices[-1].block if group.kind == "heads" else 0)


def unit_cache_features(group: UnitGroup) -> int:
    """Numbers per token of the keys and values that go from a decoder's cache with one unit."""
    if group.kind == "keys":
        return 2 * group.slices[0].block
    if group.kind != "heads" or group.head_unit == "query_head" or group.cache is not None:
        return 0
    return 2 * group.slices[-1].block // group.members


def cache_features(space: PruningSpace, kept: Kept | None = None) -> int:
    """Numbers per token in the cache of a decoder: the keys and values of all attention blocks."""
    kept, total = kept or {}, 0
    size = space.head_dims.size if space.head_dims else 1
    left = kept.get("head_dims", size)
    for group in (*space.groups, *space.unprunable):
        if group.kind != "heads" or not kept.get(space.block(group).name, 1):
            continue
        units, keys = kept.get(group.name, group.size), space.keys_of(group)
        if group.cache is not None:
            total += group.cache if units else 0
            continue
        count = group.heads(units)[1] if keys is None else kept.get(keys.name, keys.size)
        total += 2 * (group.slices[-1].block // group.members) * left // size * count if units else 0
    return total


def kept_shapes(space: PruningSpace, kept: Kept) -> dict[str, tuple[int, ...]]:
    """The shape of every weight that remains; weights of removed blocks are left out.

    If all heads or FFN dimensions of a block are removed, only its residue remains, if it has one: the
    block adds nothing else to the residual stream.
    """
    shapes = {path: list(shape) for path, shape in space.shapes.items()}
    gone: set[str] = set()
    for group in space.every:
        left = kept.get(group.name, group.size)
        gone |= weights_gone(space, group, left)
        if group.kind != "layer" and left < group.size:
            for piece in group.slices:
                heads = round(piece.repeats * _share_of_heads(space, piece, kept))
                gone_units = (group.size - left) * (piece.row_units or group.size) // group.size
                shapes[piece.path][piece.dim] -= gone_units * piece.block * heads
    gone |= shared_gone(space, kept)
    return {path: tuple(shape) for path, shape in shapes.items() if path not in gone}


def _share_of_heads(space: PruningSpace, piece: WeightSlice, kept: Kept) -> float:
    """The share of the heads that stays in which head dimensions lie; 1 for other units."""
    owner = space.owner(piece)
    return 1.0 if owner is None else kept.get(owner.name, owner.size) / owner.size


def shared_gone(space: PruningSpace, kept: Kept) -> set[str]:
    """The weights of several blocks none of which reads its input any more."""
    if not space.shared:
        return set()
    groups = (*space.groups, *space.unprunable)
    idle = {space.block(g).name for g in groups if not kept.get(g.name, g.size) and g.kind != "keys"}
    return {path for path, blocks in space.shared.items() if idle.issuperset(blocks)}


def weights_gone(space: PruningSpace, group: UnitGroup, left: int) -> set[str]:
    """The weights that are removed entirely if `group` keeps `left` units."""
    if left or group.kind in WIDE:
        return set()
    if group.kind == "layer":
        return {piece.path for piece in group.slices}
    block = space.block(group)
    return {piece.path for piece in block.slices} - set(block.residue)


def parameters(space: PruningSpace, kept: Kept | None = None) -> int:
    """Parameters of the whole model, embeddings included, with the units in `kept`."""
    return sum(prod(shape) for shape in kept_shapes(space, kept or {}).values())


def active_parameters(space: PruningSpace, kept: Kept | None = None) -> int:
    """Parameters that compute one token: of the experts, only those that the token passes through."""
    shapes, idle = kept_shapes(space, kept or {}), 0
    for group in (*space.groups, *space.unprunable):
        inside = {s.path for s in group.slices if not s.path.startswith(f"{group.gate.module}.")}
        for path in inside if group.kind == "experts" else ():
            if path in shapes:
                idle += prod(shapes[path]) * (shapes[path][0] - group.active) // shapes[path][0]
    return sum(map(prod, shapes.values())) - idle


def block_parameters(space: PruningSpace, kept: Kept | None = None) -> int:
    """Parameters inside the prunable blocks; `target_sparsity` is a share of them."""
    inside = {piece.path for group in space.of("layer") for piece in group.slices}
    return sum(prod(shape) for path, shape in kept_shapes(space, kept or {}).items() if path in inside)


def forward_flops(space: PruningSpace, kept: Kept | None = None, *, context: int) -> float:
    """FLOPs per token of the forward pass: 2 per weight of every matrix product, and the attention over `context` keys.

    Args:
        space: The pruning space.
        kept: Units kept per group.
        context: Mean number of keys that a query attends to.
    """
    shapes = kept_shapes(space, kept or {})
    groups = (*space.groups, *space.unprunable)
    inside = {piece.path for group in groups for piece in group.slices}
    products = sum(2 * prod(shape) for path, shape in shapes.items() if path in inside and is_product(path, shape))
    for group in groups:
        if group.active and group.kind == "dimff":
            experts = [shapes[path] for path in {s.path for s in group.slices} if path in shapes]
            products += sum(2 * prod(shape) // shape[0] * group.active for shape in experts if len(shape) == 3)
    # Scores and the weighted sum of values: each 2·context FLOPs per feature of the attention's inner width.
    outs = [group.slices[-1] for group in groups if group.kind == "heads"]
    attention = sum(4 * context * shapes[out.path][out.dim] for out in outs if out.path in shapes)
    logits = 2 * prod(shapes[space.logits_weight]) if space.logits_weight else 0
    return float(products + attention + logits)
