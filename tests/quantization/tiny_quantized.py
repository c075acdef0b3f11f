"""Fake quantization on real engines, for `test_prepare_engines.py`: `python … tiny_quantized.py CASES.json OUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cook.base import distributed
from cook.base.environment import quiet_torchao

quiet_torchao()

from cook.quantization.prepare import FakeQuantization  # noqa: E402
from cook.quantization.schemes import chosen_modules, scheme_of  # noqa: E402
from cook.training.engine import initialise_processes  # noqa: E402
from tests.training import tiny_training as tiny  # noqa: E402

SUFFIXES = ("project_q", "attention_out", "w_in.w_0")
"""Modules with 24 inputs, as groups of 8 need them."""


def attach(model: torch.nn.Module, scheme: str) -> None:
    # At ZeRO-3 the weights of the model itself have no shapes.
    with torch.device("meta"):
        whole = tiny.build()
    chosen = scheme_of(scheme, 8)
    # The embedding of CPM-Ant is its output projection as well.
    FakeQuantization(model, chosen, chosen_modules(whole, chosen, SUFFIXES, embeddings=scheme == "int4"))


def main() -> None:
    initialise_processes(1)
    results: dict[str, Any] = {}
    for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
        made = tiny.engine_run(case, lambda engine, _attached, case=case: attach(engine.module, case["scheme"]))
        results[name] = {key: made[key] for key in ("losses", "weights")}
    torch.save(results, f"{sys.argv[2]}.{distributed.rank()}")


if __name__ == "__main__":
    main()
