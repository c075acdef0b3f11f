"""Parameters and FLOPs of a pruning space under masks."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from cook.pruning.units import PruningSpace, UnitGroup

Kept = Mapping[str, int]
"""Units that each group keeps, by group name; a group that is not named keeps all."""


def unit_parameters(space: PruningSpace, group: UnitGroup) -> int:
    """Parameters removed with one unit of `group`, everything else kept."""
    # A buffer may be a single number, without any dimension.
    owned = [(s, space.shapes[s.path]) for s in group.slices]
    return sum(prod(shape) // (shape[s.dim] if shape else 1) * s.block for s, shape in owned)


def unit_flops(space: PruningSpace, group: UnitGroup, *, context: int) -> int:
    """FLOPs per token of the forward pass that one head or FFN dimension costs, everything else kept.

    2 per weight of its matrix products; for heads also 4 per feature and key, for the score and the weighted sum.

    Args:
        space: The pruning space.
        group: The unit's group.
        context: Mean number of keys that a query attends to.
    """
    products = [s for s in group.slices if len(space.shapes[s.path]) == 2 and not s.is_norm]
    flops = sum(2 * prod(space.shapes[s.path]) // space.shapes[s.path][s.dim] * s.block for s in products)
    return flops + (4 * context * group.slices[-1].block if group.kind == "heads" else 0)


def unit_cache_features(group: UnitGroup) -> int:
    """Numbers per token of the keys and values that go from a decoder's cache with one unit."""
    if group.kind == "keys":
        return 2 * group.slices[0].block
    if group.kind != "heads" or group.head_unit == "query_head":
        return 0
    return 2 * group.slices[-1].block // group.members


def cache_features(space: PruningSpace, kept: Kept | None = None) -> int:
    """Numbers per token in the cache of a decoder: the keys and values of all attention blocks."""
    kept, total = kept or {}, 0
    for group in (*space.groups, *space.unprunable):
        if group.kind != "heads" or not kept.get(space.block(group).name, 1):
            continue
        units, keys = kept.get(group.name, group.size), space.keys_of(group)
        count = group.heads(units)[1] if keys is None else kept.get(keys.name, keys.size)
        total += 2 * (group.slices[-1].block // group.members) * count if units else 0
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
        if group.kind != "layer":
            for piece in group.slices:
                shapes[piece.path][piece.dim] -= (group.size - left) * piece.block
    gone |= shared_gone(space, kept)
    return {path: tuple(shape) for path, shape in shapes.items() if path not in gone}


def shared_gone(space: PruningSpace, kept: Kept) -> set[str]:
    """The weights of several blocks none of which reads its input any more."""
    if not space.shared:
        return set()
    groups = (*space.groups, *space.unprunable)
    idle = {space.block(g).name for g in groups if not kept.get(g.name, g.size) and g.kind != "keys"}
    return {path for path, blocks in space.shared.items() if idle.issuperset(blocks)}


def weights_gone(space: PruningSpace, group: UnitGroup, left: int) -> set[str]:
    """The weights that are removed entirely if `group` keeps `left` units."""
    if left or group.kind == "hidden":
        return set()
    if group.kind == "layer":
        return {piece.path for piece in group.slices}
    block = space.block(group)
    return {piece.path for piece in block.slices} - set(block.residue)


def parameters(space: PruningSpace, kept: Kept | None = None) -> int:
    """Parameters of the whole model, embeddings included, with the units in `kept`."""
    return sum(prod(shape) for shape in kept_shapes(space, kept or {}).values())


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
    products = sum(2 * prod(shape) for path, shape in shapes.items() if path in inside and len(shape) == 2)
    # Scores and the weighted sum of values: each 2·context FLOPs per feature of the attention's inner width.
    outs = [group.slices[-1] for group in groups if group.kind == "heads"]
    attention = sum(4 * context * shapes[out.path][out.dim] for out in outs if out.path in shapes)
    logits = 2 * prod(shapes[space.logits_weight]) if space.logits_weight else 0
    return float(products + attention + logits)
