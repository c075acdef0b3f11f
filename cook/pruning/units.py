"""The pruning space: groups of units, the weight slices that each group owns, and the point where its gate acts.

An adapter (`cook.families`) writes a `PruningSpace` for a model; gates, parameter counts, reshaping, export and reports
read it and use nothing else about the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from cook.config.kinds import Kind

WIDE: tuple[Kind, ...] = ("head_dims", "hidden")
"""The kinds with one group for the whole model, whose name is that of the kind."""
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
    power: float = 0.0
    """Slicing multiplies the weight by (new/old)^power, where another use of the hidden size must be balanced."""
    beside: int = 0
    """For head dimensions: other dimensions that every head has behind those of the units. They stay; `power` counts
    and scales them too."""
    added: float = 0.0
    """What the model adds to the weight at run time, which `power` then scales too: 1 in Gemma's norms."""
    within: tuple[tuple[int, ...], ...] = ()
    """For head dimensions: the indices of each unit in one head; unit u has offset + h·period + `within`[u] for every
    head h, and `block` is the number of these indices."""
    period: int = 0
    """Indices per head, along `dim`, where `within` is given."""
    repeats: int = 1
    """Heads, where `within` is given."""
    row_units: int = 0
    """Units per index of dimension 0, if each index has units of its own: the dimensions inside experts, whose weights
    are fused. Unit u is then unit u % row_units of index u // row_units."""

    def indices(self, units: Sequence[int]) -> torch.Tensor:
        """The indices of these units along `dim`, in no order, int64."""
        if not self.within:
            starts = self.offset + torch.tensor(units, dtype=torch.long) * self.block
            return (starts[:, None] + torch.arange(self.block)).flatten()
        inside = torch.tensor([index for unit in units for index in self.within[unit]], dtype=torch.long)
        return (self.offset + torch.arange(self.repeats)[:, None] * self.period + inside).flatten()

    def share(self, kept: int, size: int) -> float:
        """The share of the dimensions that stays with `kept` of `size` units."""
        return (kept * self.block + self.beside) / (size * self.block + self.beside)

    def all_indices(self, size: int) -> torch.Tensor:
        """The indices of all units along `dim`, and of the dimensions `beside` them, in no order, int64."""
        if not self.beside:
            return self.indices(range(size))
        heads, inside = torch.arange(self.repeats)[:, None], torch.arange(size * self.block + self.beside)
        return (self.offset + heads * self.period + inside).flatten()

    def spans(self, index: int, size: int) -> bool:
        """Whether an index along `dim` is in the part that `size` units have, which has no `within`."""
        return not self.within and self.offset <= index < self.offset + size * self.block


@dataclass(frozen=True, kw_only=True)
class GatePoint:
    """Where a group's gate acts: on the last feature dimension of a module's input or output, unless `at` names another
    way."""

    module: str
    """Path of the module as `Module.get_submodule` takes it."""
    at: Literal["input", "output", "softmax", "sigmoid", "weight", "statistics"]
    """`softmax`, `sigmoid`: on the scores of a router (`cook.pruning.routing`). `weight`: on `weight`, inside the
    module's forward pass. `statistics`: on those of a norm over the units, which then are those of the kept ones alone;
    its input is gated elsewhere."""
    repeat: int | tuple[int, ...] = 1
    """Consecutive features that share one gate, one number per gate where they differ; 0 if one gate scales all."""
    features: tuple[int, ...] = ()
    """The gate of each feature, or -1 for none, where `repeat` cannot describe it: in every head of q, k and v."""
    weight: str = ""
    """The name of a fused weight of experts, `[experts, ...]`, whose gates are `[experts, dimensions]`."""
    dim: int = 0
    """The dimension of `weight` along which the dimensions lie."""


@dataclass(frozen=True, kw_only=True)
class UnitGroup:
    """Units of one kind in one place: the block itself as a single unit, its heads, its keys, or its FFN dimensions; or
    one group for the whole model, whose layer is -1: the dimensions of every head, or of the residual stream."""

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
    """Where else the same gates act: hidden dimensions have one wherever something is added to the stream, and one for
    every norm on it."""
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
    least: int = 0
    """Units of each section that always stay: experts, of which each token needs some."""
    multiple: int = 1
    """What stays of a section must be a multiple of it: rows of fused weights must fill 16 bytes."""
    active: int = 0
    """In a mixture of experts: the experts that compute each token."""
    cache: int | None = None
    """For a group of heads: numbers per token in the cache of a decoder, if they do not depend on the heads."""
    residue: tuple[str, ...] = ()
    """For a `layer` group: the weights that still act if the block has no units left: its output projection's bias and
    the norm after it."""

    @property
    def gates(self) -> tuple[GatePoint, ...]:
        """Everywhere the gates act."""
        return (self.gate, *self.more_gates)

    @property
    def norms(self) -> tuple[GatePoint, ...]:
        """The norms over the units: on the residual stream, over the queries or keys of all heads, or over each."""
        return tuple(gate for gate in self.more_gates if gate.at == "statistics")

    @property
    def section_size(self) -> int:
        """Units in one section; only where all sections are alike."""
        assert not self.section_sizes, f"{self.name} has sections of different sizes"
        return self.size // self.sections

    @property
    def spans(self) -> tuple[int, ...]:
        """Units in each section."""
        return self.section_sizes or (self.section_size,) * self.sections

    @property
    def is_even(self) -> bool:
        """Whether every section must keep the same number of units, whatever the budget: groups of experts, and the
        dimensions inside experts, whose weights are fused."""
        return self.sections > 1 and self.kind in ("experts", "dimff")

    @property
    def counted(self) -> int:
        """The units by which configs count: query heads, experts, or FFN dimensions (of one expert)."""
        return self.section_size if self.is_even and self.kind == "dimff" else self.size * self.members

    def heads(self, units: int) -> tuple[int, int]:
        """The query heads and key-value heads of an attention block that keeps `units` of these units."""
        assert self.kind == "heads"
        return units * self.members, units if self.head_unit == "kv_group" else self.sections

    @property
    def name(self) -> str:
        """A unique, readable name, such as `layers.3.heads`, `layers.3.ffn` or `hidden`."""
        if self.kind in WIDE:
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
    head_dims: UnitGroup | None = None
    """The dimensions of every head; None if they cannot be pruned. Not among `groups` either."""
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Weights that several blocks use, such as a norm before attention and FFN in parallel, each with the names of
    these blocks' `layer` groups: it goes with the last of them."""

    @property
    def every(self) -> tuple[UnitGroup, ...]:
        """The groups of all blocks, the head dimensions and the hidden dimensions."""
        return (*self.groups, *(group for group in (self.head_dims, self.hidden) if group))

    def of(self, kind: Kind, site: Site | None = None) -> tuple[UnitGroup, ...]:
        """The groups of one kind (and site), from the first layer to the last."""
        return tuple(g for g in self.every if g.kind == kind and site in (None, g.site))

    def keys_of(self, group: UnitGroup) -> UnitGroup | None:
        """The prunable key-value heads that a group of query heads reads, if they are units of their own."""
        return next((g for g in self.of("keys") if group.kind == "heads" and g.layer == group.layer), None)

    def owner(self, piece: WeightSlice) -> UnitGroup | None:
        """The heads (or keys) in which the head dimensions of this slice lie; None if they cannot be pruned."""
        return self._owners.get((piece.path, piece.dim, piece.offset)) if piece.period else None

    @cached_property
    def _owners(self) -> dict[tuple[str, int, int], UnitGroup]:
        """The groups of `owner` by path, dimension and offset of the slice."""
        places = {(s.path, s.dim): set[int]() for s in (self.head_dims.slices if self.head_dims else ())}
        for piece in self.head_dims.slices if self.head_dims else ():
            places[piece.path, piece.dim].add(piece.offset)
        return {
            (own.path, own.dim, offset): group
            for group in self.groups
            if group.kind in ("heads", "keys")
            for own in group.slices
            for offset in places.get((own.path, own.dim), ())
            if own.spans(offset, group.size)
        }

    def block(self, group: UnitGroup) -> UnitGroup:
        """The `layer` group of the block that contains `group`."""
        wanted = ("layer", group.site, group.layer)
        return next(g for g in (*self.groups, *self.unprunable) if (g.kind, g.site, g.layer) == wanted)
