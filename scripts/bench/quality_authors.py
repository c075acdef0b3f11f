"""Peers of `quality.py` as their authors run them: with their own choice of sizes, not as scores on equal blocks.

- ShortGPT (Men et al. 2024) removes whole layers, those that change the residual stream least (1 − cos).
- FLAP (An et al. 2024; WIFV, AL-AM) removes heads and dims by one threshold for all layers. The score is a feature's
  fluctuation times its squared weights, squared for heads, and standardised per layer. What the removed features add
  on average stays as a bias.
- LLM-Pruner (Ma et al. 2023; param_first) removes by Σ abs(w · g) over all weights of a unit, as much from every layer
  but the first 4 and the last 3.

Every method removes as many parameters of the given units as the other rows of its column.
"""

from __future__ import annotations

from typing import Any

import torch
from quality_gates import Masks, constraints, in_order
from quality_rig import Rig

from cook.pruning.counts import unit_parameters
from cook.pruning.units import UnitGroup

AUTHORS = ("ShortGPT", "FLAP", "LLM-Pruner")
SPARED = (4, 3)
"""The first and last layers from which LLM-Pruner removes nothing, its default."""


def authors_masks(
    rig: Rig, scores: dict[str, dict[str, torch.Tensor]], method: str, unit: str, share: float
) -> tuple[Masks, dict[str, torch.Tensor]]:
    """The masks of a method, and what it adds to the inputs of output projections, `[features]` by group."""
    groups = in_order(rig.groups(unit))
    if method == "ShortGPT":
        return whole_layers(groups, scores["layer influence"], share), {}
    if method == "FLAP":
        masks = one_threshold(rig, groups, scores["standardised"], share)
        means = {group.name: scores["mean"][group.name] for group in groups}
        repeated = {g.name: masks[g.name].repeat_interleave(g.gate.repeat) for g in groups}
        return masks, {name: mean * (1 - repeated[name]) for name, mean in means.items()}
    return inner_layers(rig, groups, scores["weight gradients"], share), {}


def whole_layers(groups: list[UnitGroup], influence: dict[str, torch.Tensor], share: float) -> Masks:
    """Masks of both blocks of the layers with the least influence."""
    by_layer = {group.layer: float(influence[group.name]) for group in groups}
    gone = sorted(by_layer, key=lambda layer: by_layer[layer])[: round(share * len(by_layer))]
    return {group.name: torch.tensor([float(group.layer not in gone)]) for group in groups}


def one_threshold(rig: Rig, groups: list[UnitGroup], scores: dict[str, torch.Tensor], share: float) -> Masks:
    """The units with the lowest scores go, whatever their kind and layer, until enough parameters are removed."""
    (budget,) = constraints(rig, groups, share, "global")
    values = torch.cat([scores[group.name] for group in groups])
    order = values.argsort()
    removed = torch.tensor(budget.costs, dtype=torch.float64)[order].cumsum(0)
    mask = torch.ones(len(values))
    mask[order[removed <= budget.target + 1e-12]] = 0
    return dict(zip((g.name for g in groups), mask.split([group.size for group in groups]), strict=True))


def inner_layers(rig: Rig, groups: list[UnitGroup], scores: dict[str, torch.Tensor], share: float) -> Masks:
    """As many of the lowest units from every layer but the spared ones, so that the total is that of `share`."""
    last = rig.space.num_layers - SPARED[1]
    inner = [group for group in groups if SPARED[0] <= group.layer < last]
    sizes = {group.name: unit_parameters(rig.space, group) * group.size for group in groups}
    (budget,) = constraints(rig, groups, share, "global")
    own_share = budget.target * sum(sizes.values()) / sum(sizes[group.name] for group in inner)
    masks = {group.name: torch.ones(group.size) for group in groups}
    for group in inner:
        masks[group.name][scores[group.name].argsort()[: round(own_share * group.size)]] = 0
    return masks


def add_to_inputs(rig: Rig, added: dict[str, torch.Tensor]) -> list[Any]:
    """Hooks that add what FLAP keeps of the removed features; they run after the gates."""
    groups = {group.name: group for group in rig.space.groups}

    def hook(name: str) -> Any:
        return lambda _module, inputs: (inputs[0] + added[name].to(inputs[0].dtype), *inputs[1:])

    return [rig.model.get_submodule(groups[name].gate.module).register_forward_pre_hook(hook(name)) for name in added]
