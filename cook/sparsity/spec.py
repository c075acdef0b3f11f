"""The settings of a sparsity pattern: type, granularity, score, and historical quirks to reproduce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from cook.base.errors import UserError
from cook.config.scheme import NAMES, NUMBERED, PatternScore, Quirks

SCORES: tuple[str, ...] = get_args(PatternScore)


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
    """B: side of a block (type 5)."""

    vector: int = 16
    """Rows of a vector (type 4)."""

    score: PatternScore = "taylor_w2"
    """`taylor_w2`: (g·W²·M)²; `taylor`: (g·W·M)²; `magnitude`: |W·M|."""

    quirks: Quirks = Quirks()
    """Historical behaviours to reproduce."""

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
        """The pattern's name, also if a number was given."""
        return NUMBERED[self.type] if isinstance(self.type, int) else self.type

    def percent(self, sparsity: float) -> float:
        """The effective sparsity in percent for the requested one.

        Raises:
            UserError: `sparsity` is not between 0 and 100.
        """
        if not 0 <= sparsity <= 100:
            raise UserError("the sparsity is out of range", wanted="0 to 100 percent", got=sparsity)
        return float(int(sparsity)) if self.quirks.whole_percents else float(sparsity)


GLUE_SPARSITIES = (25.0, 35.0, 50.0, 55.0, 60.0, 65.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0)
"""Sparsities in percent, for type 8 with G = 128."""
SQUAD_SPARSITIES = (20.0, 37.0, 50.0, 55.0, 61.0)
"""Percent."""
SINGLE_SPARSITIES = (50.0,)
"""Sparsities in percent, for type 5."""


def check_schedule(sparsities: tuple[float, ...]) -> None:
    """Checks that a schedule is not empty, is between 0 and 100, and increases.

    Raises:
        UserError: names the stage.
    """
    if not sparsities:
        raise UserError("the pruning schedule has no stages", wanted="at least one sparsity in percent")
    for number, (before, now) in enumerate(zip((0.0, *sparsities), sparsities, strict=False), start=1):
        if not 0 <= now <= 100:
            raise UserError(f"stage {number}: the sparsity is out of range", wanted="0 to 100 percent", got=now)
        if number > 1 and now <= before:
            raise UserError(
                f"stage {number}: sparsities must increase, since pruned weights stay pruned",
                wanted=f"above {before}",
                got=now,
            )
