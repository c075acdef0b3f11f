"""How idle threads wait: the user's own setting wins."""

from __future__ import annotations

import os

import pytest

from cook.base.threads import SETTINGS, SPINS, spin_briefly


def test_without_a_setting_threads_spin_briefly(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == str(SPINS)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_setting_of_the_user_wins(monkeypatch, name):
    for other in SETTINGS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "7")
    spin_briefly()
    assert {key: os.environ[key] for key in SETTINGS if key in os.environ} == {name: "7"}
