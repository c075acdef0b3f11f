"""Speed and peak memory, for comparisons within one run."""

from __future__ import annotations

import ctypes
import gc
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cook.base.batches import Batch, on_device
from cook.base.device import wait_for
from cook.base.errors import UserError
from cook.data.token_loss import model_inputs

LARGEST_TIMED = 2_000_000_000
"""Models with more parameters than this are not built only to be timed."""


def median_seconds(
    actions: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int = 5
) -> dict[str, float]:
    """Measures the median seconds of each action, in turns; one warm-up round is not counted.

    Turns let changes of the machine's speed affect all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(repeats + 1):
        for name, action in actions.items():
            wait_for(device)
            start = time.perf_counter()
            action()
            wait_for(device)
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def forward_seconds(
    models: Mapping[str, torch.nn.Module], batches: Sequence[Batch], device: torch.device, *, repeats: int = 5
) -> dict[str, float]:
    """Median seconds of one pass over `batches` for each model."""
    inputs = [on_device(model_inputs(batch), device) for batch in batches]

    def one_pass(model: torch.nn.Module) -> None:
        for batch in inputs:
            model(**batch)

    return median_seconds({n: partial(one_pass, m) for n, m in models.items()}, device, repeats=repeats)


@torch.no_grad()
def pass_seconds(model: torch.nn.Module, batch: Batch, device: torch.device, *, budget: float = 5.0) -> float:
    """Median seconds of a forward pass of one model, repeated for up to `budget` seconds and 10 times.

    The first pass is a warm-up and counts only if it uses the whole budget.
    """
    inputs = on_device(model_inputs(batch), device)
    times: list[float] = []
    while len(times) < 11 and sum(times) < budget:
        wait_for(device)
        start = time.perf_counter()
        model(**inputs)
        wait_for(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


@dataclass(frozen=True, kw_only=True)
class GenerationSpeed:
    """Speed of greedy generation with a cache, for a batch of equally long prompts."""

    rows: int
    """Prompts per batch."""
    prompt: int
    """Tokens per prompt."""
    new_tokens: int
    """Tokens decoded per row after the first one, which the prefill computes."""
    prefill: float
    """Seconds of the prefill, up to the logits of the first new token."""
    decode: float
    """Seconds of all `new_tokens` steps."""

    def as_record(self) -> dict[str, float]:
        """Throughput over all rows in tokens per second, and latency per row in milliseconds."""
        return {
            "prefill_tokens_per_second": self.rows * self.prompt / self.prefill,
            "decode_tokens_per_second": self.rows * self.new_tokens / self.decode,
            "first_token_ms": 1000 * self.prefill,
            "token_ms": 1000 * self.decode / self.new_tokens,
        }


@torch.no_grad()
def generation_speed(
    models: Mapping[str, torch.nn.Module], prompts: Mapping[str, torch.Tensor], *, new_tokens: int, repeats: int = 5
) -> dict[str, GenerationSpeed]:
    """Median prefill and decode times of each model over `repeats` rounds, after one round that is not counted.

    Args:
        models: Causal language models that can keep a cache. They take turns.
        prompts: For each model its token ids, (rows, prompt), on its device.
        new_tokens: Tokens to decode per row after the first.
        repeats: Number of rounds.

    Raises:
        UserError: a model has no cache.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(repeats + 1):
        for name, model in models.items():
            ids, device = prompts[name], prompts[name].device
            # Generation needs only the last position's logits, if the model can skip the others.
            last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
            wait_for(device)
            start = time.perf_counter()
            out = model(input_ids=ids, use_cache=True, **last)
            wait_for(device)
            middle = time.perf_counter()
            if out.past_key_values is None:
                raise UserError(f"{name}: the model has no cache for decoding", remedy="skip the speed with --no-speed")
            for _ in range(new_tokens):
                following = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=following, past_key_values=out.past_key_values, use_cache=True)
            wait_for(device)
            if number:
                times[name].append((middle - start, time.perf_counter() - middle))
    speeds = {}
    for name in models:
        rows, length = prompts[name].shape
        prefill, decode = (statistics.median(values) for values in zip(*times[name], strict=True))
        speeds[name] = GenerationSpeed(rows=rows, prompt=length, new_tokens=new_tokens, prefill=prefill, decode=decode)
    return speeds


STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): resets the peak resident set size to the current one


class PeakMemory:
    """A context that measures the peak memory inside it, minus the memory at its start.

    On an accelerator: bytes of tensors, from PyTorch's allocator. On a CPU: the process's resident memory, from Linux.
    """

    bytes: int | None = None
    """Bytes; set when the context ends; None if the system does not report it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self._device)
            self._before = torch.accelerator.memory_allocated(self._device)
        else:
            self._before = _start_of_resident()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            wait_for(self._device)
            on_cpu = self._device.type == "cpu"
            peak = _status("VmHWM") if on_cpu else torch.accelerator.max_memory_allocated(self._device)
            self.bytes = max(0, peak - self._before)


def _start_of_resident() -> int | None:
    try:
        # Memory that was freed before and kept by the C library would hide as much of the new memory.
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library: the result may be too low after earlier work in the same process
    try:
        CLEAR.write_text(RESET_PEAK)
        return _status("VmRSS")
    except (OSError, StopIteration):
        return None  # not Linux, or a sandbox without /proc


def _status(field: str) -> int:
    """A size from this process's status, in bytes."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
