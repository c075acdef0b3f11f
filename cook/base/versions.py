"""The oldest library versions with which files can be opened safely."""

from __future__ import annotations

import importlib.metadata
import re

from cook.base.errors import UserError

OLDEST = {
    "torch": ((2, 10), "weights_only loading could run code from a file: CVE-2025-32434, CVE-2026-24747"),
    "deepspeed": ((0, 15, 1), "its launcher allowed command injection: CVE-2024-43497"),
}


def check_versions() -> None:
    """Refuses libraries with known vulnerabilities.

    Raises:
        UserError: a library is older than in `OLDEST`.
    """
    for name, (oldest, reason) in OLDEST.items():
        found = importlib.metadata.version(name)
        # Only the numbers before a suffix such as +cu130 or rc1.
        if tuple(map(int, re.findall(r"\d+", re.split(r"[+a-z]", found)[0]))) < oldest:
            wanted, remedy = ".".join(map(str, oldest)) + " or newer", "pip install -r requirements.txt"
            raise UserError(f"{name} is too old: {reason}", wanted=wanted, got=found, remedy=remedy)
