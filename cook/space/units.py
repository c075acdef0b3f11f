"""The one description of what is prunable: groups of units, the weight slices each owns, the point where its gate acts.

An adapter (`cook.adapters`) writes a `PruningSpace` for a model; gates, parameter counts, reshaping, export and reports
read it and know nothing else about the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["layer", "heads", "dimff"]
Site = Literal["att", "ffn"]


@dataclass(frozen=True, kw_only=True)
class WeightSlice:
    """The part of one weight that a group owns: unit u has indices [u·block, (u+1)·block) of dimension `dim`."""

    path: str
    """Key in the model's state dict."""
    dim: int
    """The dimension along which the units lie."""
    block: int
    """Indices a unit, along `dim`."""
    fan_in: bool = False
    """True where the model divides by √(size of `dim`) at run time, so that slicing must multiply by √(new/old)."""


@dataclass(frozen=True, kw_only=True)
class GatePoint:
    """Where a group's gate multiplies: the last feature dimension of a module's input or output."""

    module: str
    """Path of the module as `Module.get_submodule` takes it."""
    at: Literal["input", "output"]
    repeat: int
    """Consecutive features that share one gate; 0 if the only gate scales all features."""


@dataclass(frozen=True, kw_only=True)
class UnitGroup:
    """Units of one kind at one place: the single unit "this block", the heads of a block, its dim_ff dims."""

    kind: Kind
    site: Site
    layer: int
    """Index of the layer, as the model's keys count it."""
    size: int
    """How many units."""
    slices: tuple[WeightSlice, ...]
    gate: GatePoint

    @property
    def name(self) -> str:
        """A unique, readable name, such as `layers.3.heads` or `layers.3.ffn`."""
        return f"layers.{self.layer}.{self.site if self.kind == 'layer' else self.kind}"


@dataclass(frozen=True, kw_only=True)
class PruningSpace:
    """All that can be pruned in a model.

    A block that the model lacks has no groups here. Groups are in the order of the layers, attention before FFN.
    """

    num_layers: int
    shapes: Mapping[str, tuple[int, ...]]
    """The shape of every weight in the state dict, prunable or not."""
    groups: tuple[UnitGroup, ...]
    unprunable: tuple[UnitGroup, ...] = ()
    """Groups that the model has and the user wants left whole (`pruned_module`): mask files count them as kept."""

    def of(self, kind: Kind, site: Site | None = None) -> tuple[UnitGroup, ...]:
        """The groups of one kind (and site), from the bottom of the model up."""
        return tuple(g for g in self.groups if g.kind == kind and site in (None, g.site))

    def block(self, group: UnitGroup) -> UnitGroup:
        """The `layer` group of the block in which `group` lies."""
        wanted = ("layer", group.site, group.layer)
        return next(g for g in (*self.groups, *self.unprunable) if (g.kind, g.site, g.layer) == wanted)
