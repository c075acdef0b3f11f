from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cook.base.errors import UserError
from cook.evaluation import speed
from cook.evaluation.speed import PeakMemory
from tests.models.cpm_ant_tiny import tiny_model


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


def test_one_model_is_timed_within_a_budget(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    def timed(*seconds):
        left = iter(seconds)

        def forward(**batch):
            now[0] += next(left)

        return speed.pass_seconds(forward, {"input": torch.zeros(1)}, torch.device("cpu"), budget=5.0)

    assert timed(60.0) == 60  # a slow machine: no second pass
    assert timed(2.0, 1.0, 1.5, 1.0, 99) == 1.0  # the first one warms up
    assert timed(0.3, *[0.1] * 5, *[0.2] * 5) == pytest.approx(0.15)  # at most ten that count


def test_prefill_and_decode_by_turns(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    class Model:
        def __init__(self, name, slow):
            self.name, self.slow, self.round = name, slow, -1

        def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
            assert use_cache and not torch.is_grad_enabled()
            self.round += past_key_values is None
            outlier = 100 if self.round == 0 else 7 if self.round == 2 else 1
            now[0] += self.slow * outlier * (3 if past_key_values is None else 0.5)
            calls.append((self.name, tuple(input_ids.shape), logits_to_keep))
            seen = (past_key_values or 0) + input_ids.shape[1]
            return SimpleNamespace(logits=torch.eye(9)[None, -1:].expand(2, 1, 9), past_key_values=seen)

        __call__ = forward

    models = {"slow": Model("slow", 4), "fast": Model("fast", 1)}
    prompts = {name: torch.zeros(2, 5, dtype=torch.long) for name in models}
    got = speed.generation_speed(models, prompts, new_tokens=3, repeats=3)
    one = [(name, shape, keep) for name in models for shape, keep in [((2, 5), 1), *[((2, 1), 0)] * 3]]
    assert calls == one * 4
    assert (got["slow"].prefill, got["fast"].prefill) == (12, 3) and got["fast"].decode == 1.5
    record = got["fast"].as_record()
    assert record["prefill_tokens_per_second"] == pytest.approx(10 / 3) and record["first_token_ms"] == 3000
    assert record["decode_tokens_per_second"] == pytest.approx(4) and record["token_ms"] == pytest.approx(500)


def test_decoding_continues_as_generate_does():
    model, ids = tiny_model(), torch.tensor([[7, 8, 9, 4]])
    fed = []
    handle = model.register_forward_pre_hook(lambda m, a, k: fed.append(k["input_ids"].tolist()), with_kwargs=True)
    speed.generation_speed({"m": model}, {"m": ids}, new_tokens=5, repeats=1)
    handle.remove()
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1)[0, 4:]
    assert fed[-5:] == [[[int(token)]] for token in wanted]


def test_a_model_without_a_cache_is_refused():
    class Model(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.zeros(1, 3, 9), past_key_values=None)

    with pytest.raises(UserError, match="has no cache"):
        speed.generation_speed({"m": Model()}, {"m": torch.zeros(1, 3, dtype=torch.long)}, new_tokens=1, repeats=1)


CPU, MIB = torch.device("cpu"), 1 << 20


def test_the_peak_and_not_what_was_there_before_or_is_left():
    def small() -> int:
        before = torch.ones(40 * MIB // 4)
        with PeakMemory(CPU) as peak:
            del before
            torch.ones(4 * MIB // 4)
        assert peak.bytes is not None
        return peak.bytes

    def large() -> int:
        with PeakMemory(CPU) as peak:
            for _ in range(3):
                torch.ones(60 * MIB // 4)
        assert peak.bytes is not None
        return peak.bytes

    # Threads of the process that earlier tests have left may need memory meanwhile, so the least of some is compared.
    assert 56 * MIB < min(large() for _ in range(5)) < 80 * MIB
    assert min(small() for _ in range(5)) < 16 * MIB


def test_memory_that_was_freed_before_does_not_hide_what_comes():
    pieces = [torch.ones(16 << 10) for _ in range(600)]  # 64 KiB each: the C library keeps such on its heap
    above = torch.ones(16 << 10)  # keeps the heap from shrinking when what lies below is freed
    pieces.clear()
    with PeakMemory(CPU) as peak:
        kept = [torch.ones(16 << 10) for _ in range(600)]
    assert len(kept) == 600 and above.numel() and peak.bytes is not None and peak.bytes > 30 * MIB


def test_a_system_that_does_not_report_its_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "CLEAR", tmp_path / "missing" / "clear_refs")
    with PeakMemory(CPU) as peak:
        pass
    assert peak.bytes is None
