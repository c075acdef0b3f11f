"""`pruned_module`: the weights that may be pruned, and the groups that therefore remain in the space."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from cook.base.errors import UserError
from cook.pruning.units import PruningSpace, UnitGroup

ROUTER = "router.weight"
"""The weight that chooses experts. The stage `moefy` adds it to blocks whose matrices are named already."""


def restrict(space: PruningSpace, allowed: Sequence[str], aliases: Mapping[str, tuple[str, ...]]) -> PruningSpace:
    """The space with only the groups that `allowed` names; the others become `unprunable`.

    Hidden dimensions remain if all matrices on the residual stream are named, the embeddings among them. Head
    dimensions remain if all matrices of attention are named.

    Args:
        space: All that the family can prune.
        allowed: Suffixes of state-dict keys, whole path components (`w_out.weight` does not match `xw_out.weight`).
        aliases: The adapter's aliases of suffixes.

    Raises:
        UserError: a suffix matches no weight, or only some weights of a group are named.
    """
    suffixes = {suffix: (suffix, *aliases.get(suffix, ())) for suffix in allowed}

    def named(path: str) -> bool:
        return any(ends_with(path, s) for spellings in suffixes.values() for s in spellings)

    for suffix, spellings in suffixes.items():
        if not any(ends_with(path, s) for path in space.shapes for s in spellings):
            raise UserError(f"pruned_module: {suffix!r} matches no weight of the model", got=_some_paths(space))

    def is_allowed(group: UnitGroup) -> bool:
        matrices = [s.path for s in group.slices if is_matrix(space, s.path) and not ends_with(s.path, ROUTER)]
        chosen = [path for path in matrices if named(path)]
        if chosen and len(chosen) < len(matrices):
            left_out = next(path for path in matrices if path not in chosen)
            raise UserError(
                f"pruned_module names {chosen[0]!r} but not {left_out!r}, which share their units",
                remedy="name all matrices of the block or none of them",
            )
        return bool(chosen)

    def if_all_named(group: UnitGroup | None) -> UnitGroup | None:
        paths = [s.path for s in group.slices if is_matrix(space, s.path)] if group else []
        return group if all(map(named, paths)) else None

    hidden, head_dims = if_all_named(space.hidden), if_all_named(space.head_dims)
    groups = tuple(group for group in space.groups if is_allowed(group))
    if not groups:
        raise UserError("pruned_module leaves nothing to prune", got=list(allowed), wanted=_some_paths(space))
    others = tuple(group for group in space.groups if group not in groups)
    return dataclasses.replace(
        space, groups=groups, unprunable=(*space.unprunable, *others), hidden=hidden, head_dims=head_dims
    )


def is_matrix(space: PruningSpace, path: str) -> bool:
    """Whether a weight is a matrix, or the fused matrices of experts."""
    return len(space.shapes[path]) >= 2 and not path.endswith("bias")


def ends_with(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith("." + suffix)


def _some_paths(space: PruningSpace) -> str:
    prunable = {s.path.split(".", 3)[-1] for g in space.groups for s in g.slices if is_matrix(space, s.path)}
    return "suffixes of weights such as " + ", ".join(sorted(prunable))
