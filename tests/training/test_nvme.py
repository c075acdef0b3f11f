"""ZeRO 3 with weights on a disk, on two ranks, against the same run in memory; bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from tests.recipe.tiny_run import run_on_ranks
from tests.training import nvme_ranks

pytestmark = pytest.mark.skipif(
    not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False),
    reason="libaio with its headers is not installed",
)
KINDS = {"trained": {}, "trained on the host": {"offload_optimizer": {"device": "cpu"}}, "frozen": {}}
"""What else is offloaded, by the kind of run."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, cases = tmp_path_factory.mktemp("nvme"), dict[str, Any]()
    for kind, other in KINDS.items():
        disk = folder / kind
        disk.mkdir()
        shared = {"train_weights": kind != "frozen", "folder": str(disk)}
        cases[f"{kind}, in memory"] = shared | {"zero_optimization": other}
        size = {"buffer_size": 1 << 20} if kind == "trained" else {}
        zero = {"offload_param": {"device": "nvme", "nvme_path": str(disk), **size}, **other}
        cases[f"{kind}, on disk"] = shared | {"zero_optimization": zero}
        cases[f"{kind}, resumed"] = shared | {"zero_optimization": zero, "halved": True}
    # DeepSpeed builds two ops first, which takes minutes.
    return run_on_ranks(nvme_ranks.__file__, cases, folder, 2, timeout=1800)[0]


def same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["losses"] == second["losses"] and torch.equal(first["gates"], second["gates"])
    assert first["weights"].keys() == second["weights"].keys()
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_from_a_disk_is_training_in_memory(results, kind):
    memory, disk = (results[f"{kind}, {place}"] for place in ("in memory", "on disk"))
    assert memory["on disk"] == 0 and disk["on disk"] > 4 * sum(w.numel() for w in memory["weights"].values()) / 2
    same(disk, memory)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_disk_that_resumes_is_the_uninterrupted_one(results, kind):
    whole, resumed = (results[f"{kind}, {how}"] for how in ("on disk", "resumed"))
    same(resumed, whole)
