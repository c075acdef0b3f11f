"""How long idle CPU threads spin before they sleep. This must be set before torch is imported."""

from __future__ import annotations

import os

SPINS = 10_000
"""Iterations that an OpenMP thread of GCC's runtime spins at a barrier before it sleeps: about 20 microseconds.

With GCC's default of 300,000, training next to another busy process is 6 to 9 times slower, because spinning threads
occupy the cores that the other threads need. Sleeping at once (`OMP_WAIT_POLICY=PASSIVE`) costs a quarter of the speed
on an idle machine. `scripts/bench/omp_waiting.py` measures both; `results/bench/omp_waiting.json` has the figures.
"""
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def spin_briefly() -> None:
    """Sets the spin count of this process and its children, unless the user has set how threads wait."""
    if not any(name in os.environ for name in SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
