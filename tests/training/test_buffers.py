"""Rotary frequencies stay exact under every engine: bf16 would put distant tokens at wrong angles."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.recipe.tiny_run import REPOSITORY, run

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from cook.families.source import unfilled_model
from cook.config.types import TrainingConfig
from cook.training.engine import Engine, initialise_processes
from tests.tiny_families import tiny_source

initialise_processes(1)
source = tiny_source("gemma3")
wanted = {n: b for n, b in source.adapter.build(source.config).named_buffers() if b.is_floating_point()}
assert wanted and any((b != b.bfloat16().float()).any() for b in wanted.values())
training = TrainingConfig(
    steps=1, train_batch_size=1, micro_batch_size=1, learning_rate=0.1, precision="bf16", threads=1
)
for stage in (0, 2, 3):
    engine = Engine(
        lambda: unfilled_model(source.adapter, source.config), {n: t.detach() for n, t in source.tensors.items()},
        training, {"zero_optimization": {"stage": stage}},
    )
    found = dict(engine.module.named_buffers())
    assert all(torch.equal(found[name], buffer) for name, buffer in wanted.items()), stage
    assert next(engine.module.parameters()).dtype == torch.bfloat16
    engine.close()
print("exact")
"""


def test_buffers_are_not_rounded_with_the_weights(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run([sys.executable, "script.py", str(REPOSITORY)], tmp_path)
    assert done.code == 0 and "exact" in done.out, done
