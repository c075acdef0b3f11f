"""The pruning space: groups of units, the weight slices that each group owns, and the point where its gate acts.

An adapter (`cook.families`) writes a `PruningSpace` for a model; gates, parameter counts, reshaping, export and reports
read it and use nothing else about the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["layer", "heads", "keys", "dimff", "hidden"]
"""`keys` are key-value heads whose query heads are units of their own: each goes with the last of its query heads.
`hidden` are the dimensions of the residual stream, one group for the whole model."""
Site = Literal["att", "ffn", "stream"]
HeadUnit = Literal["kv_group", "query_head"]
"""The unit of attention: a key-value head with all its query heads, or a single query head, whose keys and values
stay as long as another query head reads them."""


@dataclass(frozen=True, kw_only=True)
class WeightSlice:
    """The part of a weight that a group owns: unit u has indices offset + [u·block, (u+1)·block) of dimension `dim`.

    A fused weight has one slice per part (queries, keys, values; gate and up).
    """

    path: str
    """Key in the model's state dict."""
    dim: int
    """The dimension along which the units lie."""
    block: int
    """Indices per unit, along `dim`."""
    offset: int = 0
    """Index at which the part of a fused weight begins, along `dim`."""
    fan_in: bool = False
    """True if the model divides by √(size of `dim`) at run time, so that slicing must multiply by √(new/old)."""
    power: float = 0.0
    """Slicing multiplies the weight by (new/old)^power, where another use of the hidden size must be balanced."""
    is_norm: bool = False
    """Whether the weight is that of a norm, even if it has a row per head."""
    added: float = 0.0
    """What the model adds to the weight at run time, which `power` then scales too: 1 in Gemma's norms."""


@dataclass(frozen=True, kw_only=True)
class GatePoint:
    """Where a group's gate multiplies: the last feature dimension of a module's input or output."""

    module: str
    """Path of the module as `Module.get_submodule` takes it."""
    at: Literal["input", "output"]
    repeat: int | tuple[int, ...]
    """Consecutive features that share one gate, one number per gate where they differ; 0 if one gate scales all."""


@dataclass(frozen=True, kw_only=True)
class NormPoint:
    """A norm over the units of a group, whose statistics must be those of the kept units alone."""

    module: str
    """Path of the module; what feeds it is gated already."""
    repeat: int = 1
    """Consecutive features of one unit."""


@dataclass(frozen=True, kw_only=True)
class UnitGroup:
    """Units of one kind in one place: the block itself as a single unit, its heads, its keys, or its FFN dimensions; or
    the dimensions of the residual stream, whose site is `stream` and whose layer is -1."""

    kind: Kind
    site: Site
    layer: int
    """Index of the layer, as in the model's keys."""
    size: int
    """The number of units."""
    slices: tuple[WeightSlice, ...]
    """In a group of heads or FFN dimensions, the block's output projection comes last."""
    gate: GatePoint
    more_gates: tuple[GatePoint, ...] = ()
    """Where else the same gates multiply: hidden dimensions have one wherever something is added to the stream."""
    norms: tuple[NormPoint, ...] = ()
    """Norms over all units: on the residual stream, or over the queries or keys of all heads."""
    members: int = 1
    """Heads (or FFN dimensions) per unit: a key-value group is one unit of several query heads. Configs, mask files and
    reports count members."""
    sections: int = 1
    """Sections of consecutive units: query heads of one key-value head each. If every block has its own budget, each
    section keeps the same number of units, so that stock classes can load the result."""
    section_sizes: tuple[int, ...] = ()
    """The units of each section, if they differ; empty: equally many."""
    head_unit: HeadUnit = "kv_group"
    """For a group of heads: the kind of unit. It does not follow from the other numbers: with one key-value head the
    query heads form a single section, and so do whole groups."""
    residue: tuple[str, ...] = ()
    """For a `layer` group: the weights that still act if the block has no units left: its output projection's bias and
    the norm after it."""

    @property
    def section_size(self) -> int:
        """Units in one section; only where all sections are alike."""
        assert not self.section_sizes, f"{self.name} has sections of different sizes"
        return self.size // self.sections

    @property
    def spans(self) -> tuple[int, ...]:
        """Units in each section."""
        return self.section_sizes or (self.section_size,) * self.sections

    def heads(self, units: int) -> tuple[int, int]:
        """The query heads and key-value heads of an attention block that keeps `units` of these units."""
        assert self.kind == "heads"
        return units * self.members, units if self.head_unit == "kv_group" else self.sections

    @property
    def name(self) -> str:
        """A unique, readable name, such as `layers.3.heads`, `layers.3.ffn` or `hidden`."""
        if self.kind == "hidden":
            return self.kind
        return f"layers.{self.layer}.{self.site if self.kind == 'layer' else self.kind}"


@dataclass(frozen=True, kw_only=True)
class PruningSpace:
    """Everything that can be pruned in a model.

    A block that the model lacks has no groups. Groups are in the order of the layers, attention before FFN.
    """

    num_layers: int
    shapes: Mapping[str, tuple[int, ...]]
    """The shape of every weight in the state dict, prunable or not."""
    logits_weight: str
    """Key of the output projection to logits; empty if the model has none, as a text classifier."""
    groups: tuple[UnitGroup, ...]
    unprunable: tuple[UnitGroup, ...] = ()
    """Groups that the user excludes from pruning (`pruned_module`); mask files list them as kept."""
    hidden: UnitGroup | None = None
    """The dimensions of the residual stream; None if the hidden size cannot be pruned. It is not among `groups`, which
    all belong to a block."""
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Weights that several blocks use, such as a norm before attention and FFN in parallel, each with the names of
    these blocks' `layer` groups: it goes with the last of them."""

    @property
    def every(self) -> tuple[UnitGroup, ...]:
        """The groups of all blocks, and the hidden dimensions."""
        return (*self.groups, *([self.hidden] if self.hidden else []))

    def of(self, kind: Kind, site: Site | None = None) -> tuple[UnitGroup, ...]:
        """The groups of one kind (and site), from the first layer to the last."""
        return tuple(g for g in self.every if g.kind == kind and site in (None, g.site))

    def keys_of(self, group: UnitGroup) -> UnitGroup | None:
        """The prunable key-value heads that a group of query heads reads, if they are units of their own."""
        return next((g for g in self.of("keys") if group.kind == "heads" and g.layer == group.layer), None)

    def block(self, group: UnitGroup) -> UnitGroup:
        """The `layer` group of the block that contains `group`."""
        wanted = ("layer", group.site, group.layer)
        return next(g for g in (*self.groups, *self.unprunable) if (g.kind, g.site, g.layer) == wanted)
