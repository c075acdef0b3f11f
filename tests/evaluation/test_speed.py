from __future__ import annotations

import torch

from cook.evaluation import speed


def test_medians_without_the_warm_up(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    def model(name, seconds):
        left = iter(seconds)

        def forward(**batch):
            assert "targets" not in batch and not torch.is_grad_enabled()
            calls.append(name)
            now[0] += next(left)

        return forward

    # Two batches a pass; the first pass of each is the warm-up.
    batches = [{"input": torch.zeros(1), "targets": torch.zeros(1)}] * 2
    models = {"slow": model("slow", [99, 99, 3, 4, 5, 4, 50, 1]), "fast": model("fast", [99, 1, 1, 1, 2, 1, 1, 1])}
    assert speed.forward_seconds(models, batches, torch.device("cpu"), repeats=3) == {"slow": 9.0, "fast": 2.0}
    assert calls == ["slow", "slow", "fast", "fast"] * 4  # by turns
