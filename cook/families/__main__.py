"""`python -m cook.families`: prints the table of families."""

from __future__ import annotations

from cook.base.errors import run_entry
from cook.families.overview import families_table


def main() -> None:
    """Prints it."""
    print(families_table())


if __name__ == "__main__":
    run_entry(main)
