"""The sparsities of multi-stage pruning, in which each stage starts from the previous stage's weights and masks."""

from __future__ import annotations

from cook.base.errors import UserError

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
