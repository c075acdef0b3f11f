"""What a mask stage holds the expected sparsity to: budgets over consecutive gates."""

from __future__ import annotations

from collections.abc import Sequence

from cook.config.scheme import Scope
from cook.pruning.controller import Constraint
from cook.pruning.counts import unit_flops, unit_parameters
from cook.pruning.units import PruningSpace, UnitGroup
from cook.recipe.plan import LearnedKind, Stage

Budget = tuple[str, Sequence[float], float]
"""Name, what each unit costs, and the share of the costs to remove."""
KINDS: tuple[LearnedKind, ...] = ("layer", "heads", "dimff")


def constraints(stage: Stage, space: PruningSpace, learned: Sequence[UnitGroup]) -> list[Constraint]:
    """One over all blocks by their parameters; of heads and dims one a block, or section of a block, by its units.

    With a global scope these have one constraint instead, over all units of all blocks: by number for a single kind, by
    parameters or FLOPs for heads and dims together.

    Args:
        stage: The plan.
        space: The model's space.
        learned: Groups with gates, in the order of the flat vector of gates: blocks, then heads, then dims.
    """
    groups = {kind: [group for group in learned if group.kind == kind] for kind in KINDS}
    budgets: list[Budget] = []
    if groups["layer"]:
        sizes = [float(unit_parameters(space, group)) for group in groups["layer"]]
        budgets.append(("blocks", sizes, _blocks_to_remove(stage)))
    inner = groups["heads"] + groups["dimff"]
    if inner and _scope(stage) == "global":
        budgets.append(_shared(stage, space, inner))
    else:
        budgets += [budget for group in inner for budget in _of_block(group, _kept_share(stage, group))]
    made, start = [], 0
    for name, costs, target in budgets:
        total = sum(costs)
        made.append(Constraint(name=name, start=start, costs=tuple(cost / total for cost in costs), target=target))
        start += len(costs)
    return made


def _scope(stage: Stage) -> Scope:
    section = stage.config.joint if stage.name == "joint_mask" else stage.config.fine
    assert section is not None
    return section.scope


def _blocks_to_remove(stage: Stage) -> float:
    section = stage.config.joint if stage.name == "joint_mask" else stage.config.coarse
    assert section is not None and section.target_sparsity is not None
    return section.target_sparsity


def _kept_share(stage: Stage, group: UnitGroup) -> float:
    """The share of its units that a block keeps where all keep as many."""
    fine = stage.config.fine
    assert fine is not None
    kept = fine.target_num_heads if group.kind == "heads" else fine.target_dimff
    return kept / (group.size * group.members)


def _of_block(group: UnitGroup, kept: float) -> list[Budget]:
    names = [group.name] if group.sections == 1 else [f"{group.name}.{n}" for n in range(group.sections)]
    return [(name, [1.0] * group.section_size, 1.0 - kept) for name in names]


def _shared(stage: Stage, space: PruningSpace, groups: Sequence[UnitGroup]) -> Budget:
    """One budget for all units of these groups; where no share is given, what even blocks would keep."""
    joint = stage.config.joint if stage.name == "joint_mask" else None
    if joint and joint.target_flops is not None:
        context = joint.flops_length or stage.config.data.max_length
        each = [float(unit_flops(space, group, context=context)) for group in groups]
    elif joint:
        each = [float(unit_parameters(space, group)) for group in groups]
    else:
        each = [float(group.members) for group in groups]
    costs = [cost for group, cost in zip(groups, each, strict=True) for _ in range(group.size)]
    even = sum(_kept_share(stage, group) * group.size * cost for group, cost in zip(groups, each, strict=True))
    share = (joint.target_flops or joint.target_params) if joint else None
    name = "heads and dims" if joint else groups[0].kind
    return name, costs, 1.0 - (even / sum(costs) if share is None else share)
