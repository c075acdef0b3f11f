from __future__ import annotations

import pytest

from cook.base.errors import UserError
from cook.sparsity.schedule import GLUE_SPARSITIES, SINGLE_SPARSITIES, SQUAD_SPARSITIES, check_schedule


@pytest.mark.parametrize("schedule", [GLUE_SPARSITIES, SQUAD_SPARSITIES, SINGLE_SPARSITIES, (0.0, 62.5)])
def test_published_schedules_are_sound(schedule):
    check_schedule(schedule)


@pytest.mark.parametrize("schedule", [(), (50.0, 50.0), (50.0, 40.0), (20.0, 101.0), (-1.0,)])
def test_others_are_refused(schedule):
    with pytest.raises(UserError):
        check_schedule(schedule)
