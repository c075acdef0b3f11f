"""`deepspeed cook/train.py --config config/bmcook.json`: trains one stage, or the whole recipe (`cook train`)."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # A launcher runs this file as a script: Python has put cook/ on the path, where the package itself must be found.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cook import cli  # noqa: E402


def main() -> None:
    """Runs the command with the options in `sys.argv`, in a program of your own."""
    cli.invoke("train")


if __name__ == "__main__":
    cli.main("train")
