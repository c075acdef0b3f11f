"""`python -m cook`: the `cook` command."""

from __future__ import annotations

from cook.cli import main

if __name__ == "__main__":
    main()
