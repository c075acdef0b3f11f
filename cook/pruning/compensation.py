"""What removed heads and FFN dimensions add on average, kept as a bias of the block's output projection.

An output projection computes y = W x + b. A removed unit takes its features from x; with compensation their means over
calibration tokens, m, stay: y = W (z ⊙ x + (1 − z) ⊙ m) + b. With binary masks this is the bias b + W ((1 − z) ⊙ m), so
that the small model pays nothing for it (An et al., "Fluctuation-based adaptive structured pruning for large language
models", AAAI 2024). Gates learn with it: added to masks that were learned without it, it raises the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from cook.base import distributed
from cook.pruning.attach import by_feature, gates_before
from cook.pruning.budgets import Keep
from cook.pruning.counts import parameters
from cook.pruning.mask_set import Masks
from cook.pruning.units import PruningSpace, UnitGroup


def compensable(space: PruningSpace, groups: Iterable[UnitGroup]) -> tuple[UnitGroup, ...]:
    """The groups whose features enter an output projection that has a bias."""
    return tuple(
        group
        for group in groups
        if group.kind in ("heads", "dimff") and group.gate.at == "input" and f"{group.gate.module}.bias" in space.shapes
    )


def keep_of_wider(keep: Keep, space: PruningSpace, wide: PruningSpace) -> Keep:
    """What to keep of a model with more biases, so that as many parameters stay as `keep` leaves without them."""
    ratio = parameters(space) / parameters(wide)
    return {key: share * ratio if key == "params" else share for key, share in keep.items()}


class MeanInputs:
    """Hooks that average the input features of output projections over tokens; they can be removed.

    Args:
        model: The model, with all gates open.
        groups: Groups of `compensable`.
    """

    def __init__(self, model: torch.nn.Module, groups: Sequence[UnitGroup]):
        self._positions: torch.Tensor | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        modules = {group.name: model.get_submodule(group.gate.module) for group in groups}
        self._handles = [m.register_forward_pre_hook(partial(self._add, name)) for name, m in modules.items()]

    def at(self, positions: torch.Tensor) -> None:
        """Sets the positions of the next pass that count, among those of all its rows, int64."""
        self._positions = positions
        self._count += len(positions)

    def _add(self, name: str, _module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        assert self._positions is not None, "`at` comes before the pass"
        total = inputs[0].detach().flatten(0, -2)[self._positions].double().sum(0)
        self._sums[name] = self._sums[name] + total if name in self._sums else total

    def means(self) -> dict[str, torch.Tensor]:
        """The mean of every feature over the tokens of all ranks, fp32 on the CPU, by group name; all ranks call it."""
        names = list(self._sums)
        flat = torch.cat([self._sums[name] for name in names])
        flat = distributed.all_reduce_sum(torch.cat([flat, flat.new_tensor([self._count])])).cpu()
        sizes = [len(self._sums[name]) for name in names]
        return dict(zip(names, (flat[:-1] / flat[-1]).float().split(sizes), strict=True))

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()


def with_bias(
    weights: Iterable[tuple[str, torch.Tensor]],
    space: PruningSpace,
    masks: Masks,
    means: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a model's weights, with W ((1 − z) ⊙ m) added to the biases of output projections.

    Args:
        weights: Keys and weights, in any order.
        space: The model's space.
        masks: 0/1 per unit, by group name; query heads go with their keys (`mask_set.consistent`).
        means: m by group name, as `MeanInputs` returns them.
    """
    modules = {group.gate.module: group for group in space.every if group.name in means}
    parts: dict[str, torch.Tensor] = {}  # of each module the one of b and W ((1 − z) ⊙ m) that came first
    for path, tensor in weights:
        module, _, name = path.rpartition(".")
        if module not in modules or name not in ("weight", "bias"):
            yield path, tensor
            continue
        part = tensor.clone()
        if name == "weight":
            yield path, tensor
            group = modules[module]
            gates = [(owner, gate) for owner, gate in gates_before(module, space.every) if owner in masks]
            z = math.prod((by_feature(gate, masks[owner].double()) for owner, gate in gates), start=torch.ones(()))
            weight = part.double() if group.slices[-1].dim == 1 else part.double().T  # GPT-2's is [in, out]
            part = weight @ ((1 - z) * means[group.name].double()).to(weight.device)
        if module not in parts:
            parts[module] = part
            continue
        bias, added = (part, parts[module]) if name == "bias" else (parts[module], part)
        yield f"{module}.bias", (bias.double() + added).to(bias.dtype)
        del modules[module]
    assert not modules, f"no weight or no bias for {sorted(modules)}"
