"""The device of a process, with accelerators that this machine does not have: their calls are recorded."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cook.base import device

ROOT = Path(__file__).parents[2]
KINDS = ("cuda", "xpu", "npu", "hpu", "mps")


@pytest.fixture
def present(monkeypatch):
    """Calling it with a kind makes an accelerator of this kind available; it returns what is called on it."""
    calls: list[tuple[str, object]] = []

    def appear(kind: str, *, bf16: bool = True) -> list[tuple[str, object]]:
        module = SimpleNamespace(
            is_bf16_supported=lambda: bf16,
            get_rng_state=lambda: torch.tensor([7], dtype=torch.uint8),
            get_device_name=lambda: f"a card of kind {kind}",
            set_rng_state=lambda state: calls.append(("set_rng_state", state.tolist())),
        )
        found = torch.device(kind)
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: found)
        monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
        monkeypatch.setattr("torch.accelerator.set_device_index", lambda index: calls.append(("index", index)))
        monkeypatch.setattr("torch.accelerator.synchronize", lambda where: calls.append(("synchronize", where)))
        monkeypatch.setattr("torch.get_device_module", lambda _kind: module)
        return calls

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return appear


@pytest.mark.parametrize(("kind", "backend"), [("cuda", "nccl"), ("xpu", "xccl")])
def test_any_kind_of_accelerator_is_used(present, kind, backend):
    calls = present(kind)
    assert device.default_device() == torch.device(kind)
    assert (device.accelerators(), device.card()) == (4, f"a card of kind {kind}")
    assert device.device_of_rank(3) == torch.device(kind, 3)
    assert device.collectives() == backend
    assert device.has_fast_bf16()
    device.wait_for(torch.device(kind, 3))
    device.wait_for(torch.device("cpu"))
    device.restore_random_state(device.random_state())
    assert calls == [("index", 3), ("synchronize", torch.device(kind, 3)), ("set_rng_state", [7])]


def test_an_accelerator_without_bf16_uses_fp32(present, monkeypatch):
    present("cuda", bf16=False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    assert not device.has_fast_bf16()


@pytest.mark.parametrize(("kind", "variable"), [("mps", None), ("cuda", "cpu")])
def test_an_accelerator_that_deepspeed_leaves_alone_is_not_used(present, monkeypatch, kind, variable):
    calls = present(kind)
    if variable:
        monkeypatch.setenv("DS_ACCELERATOR", variable)
    assert device.accelerator() is None and device.device_of_rank(1) == device.CPU
    assert device.collectives() == "gloo" and device.random_state() == {} and calls == []
    assert device.accelerators() == 0 and device.card() is None


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, False), ({"avx512_bf16": False}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)],
)
def test_a_cpu_is_fast_in_bf16_only_with_instructions_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert device.has_fast_bf16() is expected


def test_the_random_state_of_another_kind_of_accelerator_is_left_out(present):
    calls = present("xpu")
    device.restore_random_state({"cpu": torch.zeros(1), "cuda": torch.zeros(1)})
    assert calls == []


def named_kinds(source: str) -> list[int]:
    """Lines that use `torch.cuda` and the like."""
    nodes = ast.walk(ast.parse(source))
    found = (n for n in nodes if isinstance(n, ast.Attribute) and n.attr in KINDS and isinstance(n.value, ast.Name))
    return sorted(node.lineno for node in found if node.value.id == "torch")


def test_uses_of_one_kind_of_accelerator_are_found():
    assert named_kinds("import torch\nif torch.cuda.is_available():\n    torch.xpu.synchronize()\n") == [2, 3]


def test_no_module_names_a_kind_of_accelerator():
    files = [*(ROOT / "cook").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    assert {str(file.relative_to(ROOT)): lines for file in files if (lines := named_kinds(file.read_text()))} == {}


MAKERS = ("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm")
MAKERS += ("tensor", "tril_indices", "triu_indices", "zeros")
IN_A_STEP = (
    "cook/models",
    "cook/distill",
    "cook/families/stock.py",
    "cook/families/tables.py",
    "cook/pruning/attach.py",
)
IN_A_STEP += ("cook/data/token_loss.py", "cook/training/step.py", "cook/training/engine.py", "cook/training/zero.py")
IN_A_STEP += ("cook/training/optim.py", "cook/evaluation/scoring.py", "cook/sparsity/kernels/sparse_triton.py")
"""Code whose tensors meet those of the model. The gates and their controller compute on the CPU."""
ON_THE_DEFAULT_DEVICE = {
    ("cook/models/cook_experts.py", "__init__"): "parameters are made where the model is built",
    ("cook/models/cpm_ant.py", "__init__"): "parameters are made where the model is built",
    ("cook/models/cpm_ant.py", "forward"): "the numbers of a layer's heads, moved in the same line",
    ("cook/distill/teacher_loss.py", "apply"): "drawn on the CPU, so that every device gets the same numbers",
    ("cook/training/zero.py", "_filtered"): "norms, which are moved to the CPU in the next line",
    ("cook/evaluation/scoring.py", "predicts_blindly"): "a stand-in for logits that the model does not give",
    ("cook/families/stock.py", "_by_key"): "sizes of a config",
}


def without_device(source: str) -> list[tuple[str, int]]:
    """Function and line of every `torch.zeros(…)` and the like without a device."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            made = node.func if isinstance(node, ast.Call) else None
            if isinstance(made, ast.Attribute) and made.attr in MAKERS and ast.unparse(made.value) == "torch":
                if not {"device", None} & {keyword.arg for keyword in node.keywords}:
                    found.append((function.name, node.lineno))
    return found


def test_tensors_without_a_device_are_found():
    source = (
        "def f(x):\n    torch.zeros(3)\n    torch.ones(3, device=x.device)\n    x.new_zeros(3)\n    torch.arange(x)\n"
    )
    assert without_device(source) == [("f", 2), ("f", 5)]


def test_code_in_a_step_makes_no_tensor_without_a_device():
    files = [
        file for path in IN_A_STEP for file in ([ROOT / path] if path.endswith(".py") else (ROOT / path).glob("*.py"))
    ]
    places = [(str(f.relative_to(ROOT)), name, line) for f in files for name, line in without_device(f.read_text())]
    assert [place for place in places if place[:2] not in ON_THE_DEFAULT_DEVICE] == []
    assert {place[:2] for place in places} == set(ON_THE_DEFAULT_DEVICE), "an exception that nothing needs"
