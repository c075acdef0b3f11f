"""`python -m cook.adapters`: the table of families."""

from __future__ import annotations

from cook.adapters.overview import families_table
from cook.base.errors import run_entry


def main() -> None:
    """Prints it."""
    print(families_table())


if __name__ == "__main__":
    run_entry(main)
