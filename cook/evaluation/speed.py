"""Speed of models, for comparisons within one run: forward passes, prefill and decoding."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cook.base.batches import Batch, on_device
from cook.base.errors import UserError
from cook.data.token_loss import model_inputs

LARGEST_TIMED = 2_000_000_000
"""Parameters beyond which whole models are not built just to be timed."""


def median_seconds(
    actions: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int = 5
) -> dict[str, float]:
    """Median seconds of each action.

    They take turns, so that a machine whose speed drifts treats them alike; one warm-up round is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(repeats + 1):
        for name, action in actions.items():
            _wait(device)
            start = time.perf_counter()
            action()
            _wait(device)
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def forward_seconds(
    models: Mapping[str, torch.nn.Module],
    batches: Sequence[Batch],
    device: torch.device,
    *,
    repeats: int = 5,
) -> dict[str, float]:
    """Median seconds of one pass over `batches` for each model."""
    inputs = [on_device(model_inputs(batch), device) for batch in batches]

    def one_pass(model: torch.nn.Module) -> None:
        for batch in inputs:
            model(**batch)

    return median_seconds({n: partial(one_pass, m) for n, m in models.items()}, device, repeats=repeats)


@torch.no_grad()
def pass_seconds(model: torch.nn.Module, batch: Batch, device: torch.device, *, budget: float = 5.0) -> float:
    """Median seconds of a forward pass of one model, which is repeated for `budget` seconds and at most 10 times.

    The first pass warms up, and counts only where it takes all the time.
    """
    inputs = on_device(model_inputs(batch), device)
    times: list[float] = []
    while len(times) < 11 and sum(times) < budget:
        _wait(device)
        start = time.perf_counter()
        model(**inputs)
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


@dataclass(frozen=True, kw_only=True)
class GenerationSpeed:
    """How fast a model answers a batch of equally long prompts, greedily and with a cache."""

    rows: int
    """Prompts at once."""
    prompt: int
    """Tokens a prompt."""
    new_tokens: int
    """Tokens decoded a row after the first one, which the prefill gives."""
    prefill: float
    """Seconds from the prompts to the logits of the first new token."""
    decode: float
    """Seconds of all `new_tokens` steps."""

    def as_record(self) -> dict[str, float]:
        """Throughput over all rows, in tokens a second, and the latency that each row sees, in milliseconds."""
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
    """Median prefill and decode times of each model; the models take turns, after one round that is not counted.

    Args:
        models: Causal language models that can keep a cache.
        prompts: For each model its token ids, (rows, prompt), on its device.
        new_tokens: Tokens to decode a row after the first.
        repeats: Rounds to take the median of.

    Raises:
        UserError: a model that keeps no cache.
    """
    prefills: dict[str, list[float]] = {name: [] for name in models}
    decodes: dict[str, list[float]] = {name: [] for name in models}
    for number in range(repeats + 1):
        for name, model in models.items():
            ids, device = prompts[name], prompts[name].device
            # Generation needs the last position's logits only, where a model can leave the others out.
            last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
            _wait(device)
            start = time.perf_counter()
            out = model(input_ids=ids, use_cache=True, **last)
            _wait(device)
            middle = time.perf_counter()
            if out.past_key_values is None:
                raise UserError(f"{name}: the model keeps no cache", remedy="leave the speed out: --no-speed")
            for _ in range(new_tokens):
                following = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=following, past_key_values=out.past_key_values, use_cache=True)
            _wait(device)
            if number:
                prefills[name].append(middle - start)
                decodes[name].append(time.perf_counter() - middle)
    return {
        name: GenerationSpeed(
            rows=prompts[name].shape[0],
            prompt=prompts[name].shape[1],
            new_tokens=new_tokens,
            prefill=statistics.median(prefills[name]),
            decode=statistics.median(decodes[name]),
        )
        for name in models
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
