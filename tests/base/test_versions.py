from __future__ import annotations

import importlib.metadata

import pytest

from cook.base.errors import UserError
from cook.base.versions import OLDEST, check_versions


@pytest.mark.parametrize(
    ("name", "version", "refused"),
    [
        ("torch", "2.9.1", True),
        ("torch", "2.10.0", False),
        ("torch", "2.10.0+cu130", False),
        ("torch", "2.6", True),
        ("torch", "3.0.0rc1", False),
        ("deepspeed", "0.15.0", True),
        ("deepspeed", "0.15.1", False),
        ("deepspeed", "0.15.1+abc123", False),
        ("deepspeed", "0.9.5", True),
    ],
)
def test_holes_are_refused_by_number(monkeypatch, name, version, refused):
    safe = {other: ".".join(map(str, oldest)) for other, (oldest, _) in OLDEST.items()}
    monkeypatch.setattr(importlib.metadata, "version", {**safe, name: version}.__getitem__)
    if refused:
        with pytest.raises(UserError, match=f"{name} is too old.*CVE") as caught:
            check_versions()
        assert version in str(caught.value)
    else:
        check_versions()


def test_what_is_installed_is_new_enough():
    check_versions()
