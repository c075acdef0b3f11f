"""The script for a machine with an accelerator, on one without."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from cook.base.errors import UserError
from tests.recipe.tiny_run import REPOSITORY, run


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("card_checks", REPOSITORY / "scripts" / "card_checks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "accelerator", lambda: None)
    return module


def test_without_an_accelerator_nothing_runs(script, monkeypatch):
    monkeypatch.setattr("sys.argv", ["card_checks.py"])
    with pytest.raises(UserError, match="there is no accelerator on this machine"):
        script.main()


def test_numbers_errors_and_what_no_time_was_left_for_go_to_one_file(script, monkeypatch, tmp_path):
    assert all(
        (REPOSITORY / arguments[-1 if arguments[0] == "-m" else 0]).exists() for arguments in script.CHECKS.values()
    )
    write = "import json, sys; json.dump({'waits': 1}, open(sys.argv[-1], 'w'))"
    checks = {"good": write, "bad": "sys.exit('no kernel')", "late": write}
    for name, code in checks.items():
        (tmp_path / f"{name}.py").write_text(f"import sys\n{code}\n")
    monkeypatch.setattr(script, "ROOT", tmp_path / "a")
    (tmp_path / "a" / "scripts").mkdir(parents=True)
    monkeypatch.setattr(script, "CHECKS", {name: [f"scripts/../../{name}.py"] for name in checks})
    monkeypatch.setattr(script, "accelerator", lambda: "a card")
    clock = iter([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 470.0])
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sys, "argv", ["card_checks.py", "--output", str(tmp_path / "card.json")])
    with pytest.raises(SystemExit):
        script.main()
    found = json.loads((tmp_path / "card.json").read_text())["checks"]
    assert found["good"]["waits"] == 1 and found["good"]["error"] is None
    assert "no kernel" in found["bad"]["error"] and found["late"] == {"error": "no time was left"}


@pytest.mark.skipif(
    torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm", "CUDA"), reason="a CUDA build of PyTorch"
)
def test_fake_tensors_of_a_card_need_a_build_for_such_cards():
    done = run([sys.executable, str(REPOSITORY / "scripts" / "check_devices.py")], REPOSITORY)
    assert done.code == 2 and "has no operations for cuda" in done.err and "Traceback" not in done.err, done
