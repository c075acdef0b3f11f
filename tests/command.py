"""Runs the `cook` command in this process, as a shell would see it."""

from __future__ import annotations

import pytest

from cook.base.errors import run_entry
from cook.cli import app


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""

    def run() -> int:
        try:
            app([str(argument) for argument in arguments], prog_name="cook")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    with pytest.raises(SystemExit) as end:
        run_entry(run)
    return int(end.value.code or 0), *capsys.readouterr()
