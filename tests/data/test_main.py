"""The command line: exit codes, messages without a traceback."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.warm import interpreter

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments):
    return subprocess.run(
        [interpreter(), "-m", "cook", "data", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_exit_codes(tmp_path):
    done = command("inspect", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("error: ")
    assert "a folder of CPM-Live binary data" in done.stderr
    (tmp_path / "x.jsonl").write_text('{"task": 1, "segments": [[1, 1, 0]], "tokens": [5]}\n')
    done = command("convert", tmp_path / "x.jsonl", "--output", tmp_path / "out", "--block-size", "4K")
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'out'}: 1 records\n", done.stderr
