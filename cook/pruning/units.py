"""The one description of what is prunable: groups of units, the weight slices each owns, the point where its gate acts.

An adapter (`cook.families`) writes a `PruningSpace` for a model; gates, parameter counts, reshaping, export and reports
read it and know nothing else about the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["layer", "heads", "dimff"]
Site = Literal["att", "ffn"]
HeadUnit = Literal["kv_group", "query_head"]
"""What a unit of attention is: a key-value head with all its query heads, or a query head alone, whose keys and values
stay."""


@dataclass(frozen=True, kw_only=True)
class WeightSlice:
    """The part of one weight that a group owns: unit u has indices offset + [u·block, (u+1)·block) of dimension `dim`.

    A fused weight has several slices, one a part (queries, keys, values; gate and up).
    """

    path: str
    """Key in the model's state dict."""
    dim: int
    """The dimension along which the units lie."""
    block: int
    """Indices a unit, along `dim`."""
    offset: int = 0
    """Index at which the part of a fused weight begins, along `dim`."""
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
    """In a group of heads or dims the block's last product, which gathers the units, comes last."""
    gate: GatePoint
    members: int = 1
    """Heads (or dims) in one unit: a key-value group is one unit of several query heads. Configs, mask files and
    reports count members."""
    sections: int = 1
    """Equal stretches of units that must keep as many units each: query heads may leave their key-value groups, but
    the groups stay of one size."""
    head_unit: HeadUnit = "kv_group"
    """Of a group of heads: what one unit is. Not to be read off the other numbers: with one key-value head the query
    heads form a single section, as whole groups do."""
    residue: tuple[str, ...] = ()
    """Of a `layer` group: the weights that act on even if no unit of the block is left, its last product's bias and
    the norm behind it."""

    @property
    def section_size(self) -> int:
        """Units in one section."""
        return self.size // self.sections

    def heads(self, units: int) -> tuple[int, int]:
        """Query heads and key-value heads of an attention block that keeps so many of these units."""
        assert self.kind == "heads"
        return units * self.members, units if self.head_unit == "kv_group" else self.sections

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
    logits_weight: str
    """Key of the matrix that makes a token's logits; empty where there is none, as in a classifier of whole texts."""
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
