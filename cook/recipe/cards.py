"""Accelerators that a plan can be made for: a table of common ones, and this machine's CPU, measured."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from cook.base.errors import UserError
from cook.recipe.estimate import LOSS_ACCESSES, PASSES, Card, Setup
from cook.recipe.model_shape import Shape

GIB = 2**30
REACHED = 0.6
"""The share of a card's published rates that training reaches. Published runs reach 0.4 to 0.6 of the matrix rate over
all, with the memory traffic and the communication that are counted separately here (Korthikanti et al. 2022, table 5:
0.42 to 0.57)."""
LARGE = 1 << 26
"""Bytes that no cache holds, and that the C library would take from the system and return."""
LOOPBACK = 1.5e9
"""Bytes per second between two ranks on one CPU, by gloo."""


def _card(name: str, memory: float, half: float, single: float, bandwidth: float, link: float) -> Card:
    return Card(
        name=name,
        memory=memory * GIB,
        half=half * 1e12,
        single=single * 1e12,
        bandwidth=bandwidth * 1e9,
        link=link * 1e9,
        share=REACHED,
    )


CARDS = {
    card.name: card
    for card in (
        _card("H200", 139, 989, 67, 4800, 450),
        _card("H100", 79, 989, 67, 3350, 450),
        _card("A100-80", 79, 312, 19.5, 2039, 300),
        _card("A100-40", 39, 312, 19.5, 1555, 300),
        _card("L40S", 44, 362, 91.6, 864, 32),
        _card("RTX4090", 23.5, 165, 82.6, 1008, 32),
        _card("MI300X", 191, 1307, 163, 5300, 448),
        _card("Ascend910B", 61, 313, 75, 1600, 196),
    )
}
"""By name: usable GiB, dense TFLOP/s in bf16 with fp32 accumulation and in fp32 without TF32, GB/s of memory, and GB/s
per direction to the other cards of a host (NVLink, Infinity Fabric, HCCS, or PCIe 4.0 x16). From the vendors' data
sheets of the SXM, OAM or PCIe boards; for the Ascend, whose vendor publishes no bf16 rate, from third parties."""


def card_named(name: str) -> Card:
    """The card of a name, in any spelling of its case, spaces and dashes; "cpu" is for `measured_cpu`.

    Raises:
        UserError: there is no such card.
    """
    plain = {key.lower().replace("-", ""): card for key, card in CARDS.items()}
    found = plain.get(name.lower().replace("-", "").replace(" ", "").replace("_", ""))
    if found is None:
        raise UserError(f"--card {name}: there is no such card", wanted=f"{', '.join(CARDS)} or cpu", got=name)
    return found


def card_of_device(device: str | None) -> Card | None:
    """The card whose name has all of its parts in a device's name, such as "NVIDIA A100-SXM4-80GB"; None: unknown."""
    plain = (device or "").lower().replace(" ", "")
    return next((card for name, card in CARDS.items() if all(part in plain for part in name.lower().split("-"))), None)


def measured_cpu(shape: Shape, setup: Setup, *, budget: float = 0.4) -> Card:
    """A rank's share of this machine's CPU, measured on one layer's sizes in about three seconds.

    Every rank has its share of the cores and of the memory. The probe runs alone: ranks that share a memory bus are
    slower than it says.
    """
    ranks, threads = max(1, setup.ranks // setup.hosts), torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    try:
        rates = probe(shape, setup, budget=budget)
    finally:
        torch.set_num_threads(threads)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks
    return replace(rates, memory=memory)


def probe(shape: Shape, setup: Setup, *, budget: float = 0.4, clock: Callable[[], float] = time.perf_counter) -> Card:
    """Measures products, attention, elementwise operations, the loss, copies and Adam on the sizes of a model, on the
    CPU.

    Args:
        shape: The model.
        setup: How it is trained.
        budget: Seconds for each of the six.
        clock: Returns seconds; `time.process_time` measures the processor's time, on a busy machine.
    """

    def median(action: Callable[[], object]) -> float:
        action()
        times: list[float] = []
        while sum(times) < budget and len(times) < 50:
            start = clock()
            action()
            times.append(clock() - start)
        return statistics.median(times)

    dtype = torch.bfloat16 if setup.half else torch.float32
    block = max(shape.blocks, key=lambda one: one.weights)
    tokens, width = min(setup.tokens, 2048), setup.width

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, dtype=dtype).requires_grad_()

    x, weight = random(tokens, shape.hidden), random(block.inner, shape.hidden)
    product_seconds = median(lambda: _both_passes(F.linear(x, weight)))
    rate = 6 * tokens * weight.numel() / product_seconds

    length = min(setup.length, tokens)
    attends = max(shape.blocks, key=lambda one: one.heads)
    heads = max(1, attends.heads)
    q, k, v = (random(tokens // length, heads, length, max(1, attends.inner // heads)) for _ in range(3))
    bias = torch.randn(1, heads, length, length, dtype=dtype) if shape.score_heads else None
    attend = partial(F.scaled_dot_product_attention, attn_mask=bias, is_causal=bias is None)
    attention_seconds = median(lambda: _both_passes(attend(q, k, v)))
    attention = 4 * 3.5 * length * q.numel() / attention_seconds

    a, b = random(tokens, block.inner), random(tokens, block.inner)
    elementwise_seconds = median(lambda: _both_passes(F.gelu(a) * b))
    bandwidth = PASSES * 4 * width * a.numel() / elementwise_seconds

    loss = None
    if shape.vocab:
        logits = random(max(1, min(tokens, LARGE // shape.vocab)), shape.vocab)  # as large as in a step
        targets = torch.zeros(len(logits), dtype=torch.long)
        loss_seconds = median(lambda: F.cross_entropy(logits.float(), targets).backward())
        loss = LOSS_ACCESSES * 4 * logits.numel() / loss_seconds

    part = torch.zeros(LARGE // width // 2, dtype=dtype)
    # Memory from the C library might be what a step before has freed.
    copy_seconds = median(lambda: torch.cat([part, part], out=torch.frombuffer(mmap.mmap(-1, LARGE), dtype=dtype)))

    parameter = torch.nn.Parameter(torch.zeros(LARGE // 4))
    parameter.grad = torch.zeros_like(parameter)
    adam = torch.optim.AdamW([parameter], fused=True)
    update = 28 * parameter.numel() / median(adam.step)
    return Card(
        name="cpu",
        memory=0,
        half=rate,
        single=rate,
        bandwidth=bandwidth,
        update=update,
        copies=2 * LARGE / copy_seconds,
        loss=loss,
        link=LOOPBACK,
        attention=attention / rate,
        latency=3e-4,
        launch=0,
        overlaps=False,
        shares_memory=True,
    )


def _both_passes(result: torch.Tensor) -> None:
    result.backward(torch.ones_like(result))
