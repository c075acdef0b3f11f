"""What a sparsity pattern is told: its type, its grain, its score, and the historical quirks that it is to repeat."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from cook.base.errors import UserError

Score = Literal["taylor_w2", "taylor", "magnitude"]
SCORES: tuple[str, ...] = ("taylor_w2", "taylor", "magnitude")

NUMBERED = (
    "whole_head",
    "head_size",
    "granularity",
    "joint_qkv",
    "vector_wise",
    "block_wise",
    "local_kn",
    "tile_wise_k",
    "tile_wise_kn",
)
"""The names of types 0 to 8."""
NAMES = (*NUMBERED, "unstructured", "m4n2_1d", "m4n2_2d")


@dataclass(frozen=True, kw_only=True)
class Quirks:
    """Behaviours of the original system, each off by default: off is the corrected behaviour."""

    input_row_heads: bool = False
    """Types 0 and 1: group the input rows of query, key and value, each by itself, so that no head disappears.
    Corrected: a head is its output columns of the three and its input rows of the attention output, scored and removed
    together."""

    per_dimension_sparsity: bool = False
    """Type 8: s is what each of the two dimensions loses, 1 − (1 − s)² in all.
    Corrected: s is what the whole network loses, to the nearest row tile."""

    raw_width_norms: bool = False
    """Type 8: column norms are divided by K and row-tile norms by the tile's raw width, which over-prunes wide
    matrices. Corrected: root mean squares over the kept width."""

    revive: bool = False
    """Types 4 and 8: what an earlier stage pruned can come back, by a tie at zero or by tile cuts that moved.
    Corrected: pruned stays pruned."""

    vector_keeps_all: bool = False
    """Type 4: a sparsity that leaves less than one weight of a vector keeps the whole vector.
    Corrected: at least one weight is kept."""

    whole_percents: bool = False
    """The sparsity is cut down to a whole number: 62.5 means 62. Corrected: fractions count."""

    drifting_weights: bool = False
    """Masks hold the gradients only: pruned weights drift under weight decay and stale moments.
    Corrected: gradients, moments and weights of pruned entries are exactly 0."""

    empty_ratio_fails: bool = False
    """A matrix that ends empty ends the run: the ratio of its size to what is left divides by zero.
    Corrected: it is reported as 100% pruned."""

    total_of_stage: bool = False
    """The total reduction that is reported is the stage's own. Corrected: it is against the dense model."""

    schedule_goes_on: bool = False
    """The recovery's learning rate starts at the scoring steps' count, and reaches 0 too early.
    Corrected: each stage's recovery has its own full schedule."""

    @classmethod
    def historical(cls) -> Quirks:
        """All of them on: the original system's behaviour."""
        return cls(**{field.name: True for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class PatternSpec:
    """A pattern and its options."""

    type: int | str
    """0 to 8, or one of `NAMES`."""

    granularity: int = 128
    """G: columns of a tile (types 0 to 3 and 7), kept columns of a tile (type 8)."""

    local_granularities: tuple[int, int] = (32, 128)
    """G of type 6: for query, key and value, and for the other matrices."""

    block: int = 32
    """B: side of a block of type 5."""

    vector: int = 16
    """Rows of a vector of type 4."""

    score: Score = "taylor_w2"
    """`taylor_w2`: (g·W²·M)²; `taylor`: (g·W·M)²; `magnitude`: |W·M|."""

    quirks: Quirks = Quirks()
    """Historical behaviours to repeat."""

    def __post_init__(self) -> None:
        if self.type not in (*range(len(NUMBERED)), *NAMES) or isinstance(self.type, bool):
            raise UserError(
                "there is no such sparsity pattern",
                wanted=f"0 to {len(NUMBERED) - 1}, or one of {', '.join(NAMES)}",
                got=repr(self.type),
            )
        if self.score not in SCORES:
            raise UserError("there is no such score", wanted=", ".join(SCORES), got=repr(self.score))
        sizes = {"granularity": self.granularity, "block": self.block, "vector": self.vector}
        sizes |= {"local_granularities": min(self.local_granularities)}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"{name} of a pattern: too small", wanted="at least 1", got=size)

    @property
    def name(self) -> str:
        """The pattern's name, also where a number was given."""
        return NUMBERED[self.type] if isinstance(self.type, int) else self.type

    def percent(self, sparsity: float) -> float:
        """The sparsity in percent that counts, of the one that was asked for.

        Raises:
            UserError: not between 0 and 100.
        """
        if not 0 <= sparsity <= 100:
            raise UserError("a sparsity out of range", wanted="0 to 100 percent", got=sparsity)
        return float(int(sparsity)) if self.quirks.whole_percents else float(sparsity)
