from __future__ import annotations

import pytest

from cook.base.errors import UserError
from cook.sparsity.spec import (
    GLUE_SPARSITIES,
    NUMBERED,
    SINGLE_SPARSITIES,
    SQUAD_SPARSITIES,
    PatternSpec,
    Quirks,
    check_schedule,
)


def test_numbers_and_names_are_the_same():
    assert [PatternSpec(type=number).name for number in range(9)] == list(NUMBERED)
    assert PatternSpec(type="block_wise").name == "block_wise"


@pytest.mark.parametrize(
    "options",
    [
        {"type": 9},
        {"type": -1},
        {"type": True},
        {"type": "rows"},
        {"type": 2, "score": "luck"},
        {"type": 2, "granularity": 0},
        {"type": 6, "local_granularities": (0, 4)},
    ],
)
def test_mistakes_are_the_users(options):
    with pytest.raises(UserError):
        PatternSpec(**options)


def test_all_quirks_are_off_or_on():
    assert not any(vars(Quirks()).values()) and all(vars(Quirks.historical()).values())


@pytest.mark.parametrize("schedule", [GLUE_SPARSITIES, SQUAD_SPARSITIES, SINGLE_SPARSITIES, (0.0, 62.5)])
def test_published_schedules_are_sound(schedule):
    check_schedule(schedule)


@pytest.mark.parametrize("schedule", [(), (50.0, 50.0), (50.0, 40.0), (20.0, 101.0), (-1.0,)])
def test_others_are_refused(schedule):
    with pytest.raises(UserError):
        check_schedule(schedule)
