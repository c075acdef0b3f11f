"""`deepspeed cook/tasks.py prune --task_name SST-2`: an encoder on GLUE or SQuAD (`cook tasks`)."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # A launcher runs this file as a script: Python has put cook/ on the path, where the package itself must be found.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cook import cli  # noqa: E402


def main() -> None:
    """Runs the command with the options in `sys.argv`, in a program of your own."""
    cli.invoke("tasks")


if __name__ == "__main__":
    cli.main("tasks")
