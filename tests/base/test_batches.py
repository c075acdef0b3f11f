"""Sizes of micro-batches."""

from __future__ import annotations

import pytest

from cook.base.batches import divisors


@pytest.mark.parametrize("number", [*range(1, 40), 97, 1024])
def test_divisors_are_all_numbers_that_divide(number):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_the_divisors_of_the_largest_batch_are_found_at_once():
    assert divisors(999_999_937) == [1, 999_999_937]
    assert len(divisors(10**9)) == 100
