"""Options that a settings dataclass declares: their limits, all mistakes at once."""

from __future__ import annotations

import pytest

from tests.command import told


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (
            ["prune", "m", "--data", "d", "--keep", "dims=0.5", "--output", "o", "--steps", "0", "--round-to", "0"],
            ["--steps", "--round-to"],
        ),
        (["moefy", "m", "o", "--data", "d", "--experts", "1", "--active", "1.5"], ["--experts", "--active"]),
        (["profile", "m", "--length", "0", "--points", "65"], ["--length", "--points"]),
        (["compare", "m", "--data", "d", "--prompts", "0", "--window", "1"], ["--prompts", "--window"]),
    ],
)
def test_numbers_out_of_range_are_reported_at_once_and_before_anything_else(arguments, names, capsys):
    code, _, err = told(capsys, *arguments)
    assert code == 2 and "2 errors" in err and all(f"{name} is out of range" in err for name in names), err
