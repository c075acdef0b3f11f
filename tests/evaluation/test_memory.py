from __future__ import annotations

import torch

from cook.evaluation import memory
from cook.evaluation.memory import PeakMemory

CPU, MIB = torch.device("cpu"), 1 << 20


def test_the_peak_and_not_what_was_there_before_or_is_left():
    before = torch.ones(40 * MIB // 4)
    with PeakMemory(CPU) as small:
        del before
        torch.ones(4 * MIB // 4)
    with PeakMemory(CPU) as large:
        for _ in range(3):
            torch.ones(60 * MIB // 4)
    assert small.bytes is not None and large.bytes is not None
    # Pages of other work of the process come and go: some MiB either way.
    assert 56 * MIB < large.bytes < 80 * MIB and small.bytes < 16 * MIB


def test_memory_that_was_freed_before_does_not_hide_what_comes():
    pieces = [torch.ones(16 << 10) for _ in range(600)]  # 64 KiB each: the C library keeps such on its heap
    above = torch.ones(16 << 10)  # keeps the heap from shrinking when what lies below is freed
    pieces.clear()
    with PeakMemory(CPU) as peak:
        kept = [torch.ones(16 << 10) for _ in range(600)]
    assert len(kept) == 600 and above.numel() and peak.bytes is not None and peak.bytes > 30 * MIB


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "missing" / "clear_refs")
    with PeakMemory(CPU) as peak:
        pass
    assert peak.bytes is None
