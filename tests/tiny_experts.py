"""Tiny models whose FFN blocks are mixtures of random experts."""

from __future__ import annotations

import dataclasses

import torch

from cook.pruning.carving import Carving, carved_weights, described, expert_sizes, ffn_groups
from cook.pruning.family import ModelSource
from cook.pruning.units import UnitGroup


def random_carvings(
    source: ModelSource, *, experts: int = 6, shared: int = 1, active: float = 0.5
) -> list[tuple[UnitGroup, Carving]]:
    """Experts of random dims, and random routers."""
    generator = torch.Generator().manual_seed(0)
    space = source.adapter.space(source.config)
    found = []
    for group in ffn_groups(space, (), source.adapter.aliases):
        sizes = expert_sizes(group.size, experts=experts, shared=shared, active=active)
        hidden = space.shapes[group.slices[-1].path][1 - group.slices[-1].dim]
        carving = Carving(
            sizes=sizes,
            order=torch.randperm(group.size, generator=generator),
            weight=torch.randn(sizes.routed, hidden, generator=generator),
            bias=0.1 * torch.randn(sizes.routed, generator=generator),
            kept=0.0,
        )
        found.append((group, carving))
    return found


def with_experts(source: ModelSource, carvings: list[tuple[UnitGroup, Carving]]) -> ModelSource:
    """The model with these experts, in memory."""
    experts = dict(described(group, carving) for group, carving in carvings)
    assert source.adapter.with_experts is not None
    config = source.adapter.with_experts(source.config, experts)
    return dataclasses.replace(source, config=config, tensors=carved_weights(source.tensors, carvings))
