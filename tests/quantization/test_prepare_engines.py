"""Fake quantization under real engines on 1 and 2 ranks at every ZeRO stage, against plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.quantization import tiny_quantized
from tests.recipe.tiny_run import run_on_ranks
from tests.training import tiny_training

pytest.importorskip("torchao")
SCHEMES = ("int8", "int4")
STAGES = {1: (("int8", 1), ("int4", 3)), 2: (("int8", 0), ("int8", 2), ("int8", 3), ("int4", 1), ("int4", 3))}
"""The scheme and ZeRO stage of each case, by the number of ranks."""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    found = {}
    for ranks in (1, 2):
        cases = {
            f"{scheme}, ZeRO {zero}, {ranks} rank(s)": {
                "zero": zero,
                "scheme": scheme,
                "gated": False,
                "masked": True,
                "training": {"micro_batch_size": tiny_training.ROWS // ranks},
            }
            for scheme, zero in STAGES[ranks]
        }
        found |= run_on_ranks(tiny_quantized.__file__, cases, tmp_path_factory.mktemp(str(ranks)), ranks)[0]
    return found


def plain(scheme: str) -> dict[str, Any]:
    def extra(model: torch.nn.Module) -> None:
        tiny_quantized.attach(model, scheme)

    return tiny_training.plain_run(tiny_training.TRAINING, gated=False, masked=True, extra=extra)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_stage_and_number_of_ranks_trains_as_plain_pytorch(results, scheme):
    wanted = plain(scheme)
    unquantized = tiny_training.plain_run(tiny_training.TRAINING, gated=False, masked=True)
    moved = max(abs(a - b) for a, b in zip(wanted["losses"], unquantized["losses"], strict=True))
    for name, case in results.items():
        if not name.startswith(f"{scheme},"):
            continue
        # Sums in another order change a number that is about to be rounded by one unit now and then.
        assert case["losses"] == pytest.approx(wanted["losses"], rel=1e-3), name
        assert moved > 4 * max(abs(a - b) for a, b in zip(case["losses"], wanted["losses"], strict=True)), name
        for path, weight in wanted["weights"].items():
            # Six steps of at most 0.02; a gradient of another sign would show as twice a step.
            assert (case["weights"][path] - weight).abs().mean() < 1e-3, (name, path)
