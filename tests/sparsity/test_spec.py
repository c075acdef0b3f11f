from __future__ import annotations

import pytest

from cook.base.errors import UserError
from cook.sparsity.spec import NUMBERED, PatternSpec, Quirks


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
