"""What a training step needs: memory per rank, communication, time. Arithmetic on a few dataclasses, without a model.

N parameters, w bytes per number (4 in fp32, 2 in half precision), R ranks, T tokens of a micro-batch, M hidden size.

Sources: Rajbhandari et al. 2020, ZeRO, sec. 3.1 and 7 (model state, communication volume); Korthikanti et al. 2022,
Reducing activation recomputation in large transformer models, sec. 4 (activations of a layer, term by term); Kaplan et
al. 2020, sec. 2.1 (2 FLOPs per weight and token forward, 4 backward); Patarasu and Yuan 2009 (ring all-reduce). Where
DeepSpeed does more than the theory needs, its code is the source, and the docstring says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cook.recipe.model_shape import Shape

PASSES = 5
"""Memory accesses per number of a kept activation: read and written forward; read with its gradient, which is written
for the input, backward."""
LOSS_ACCESSES = 11
"""Accesses per fp32 logit: written; read twice for the log-softmax, which is written; its gradient zeroed; read twice
with the log-softmax, and written, for the logits' gradient, which two products read."""
GRADIENT_ACCESSES, SHARDED_ACCESSES = 8, 12
"""Accesses per gradient between backward pass and update, most of them in fp32: copied to a bucket and back, divided,
its norm, clipped; and with ZeRO 3, which also copies gathered weights and the parts of gradients (measured)."""
HOST_BANDWIDTH, HOST_LINK = 2e10, 2.5e10
"""Bytes per second of a rank's share of the host's memory, and between host and card (PCIe 4.0), for offloading."""
ADAM_ACCESSES = 7
"""Accesses per parameter in a fused Adam step: weight, gradient and two moments read, all but the gradient written."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a stage trains."""

    zero: int
    """ZeRO stage."""
    half: bool
    """bf16 or fp16, with fp32 masters; else fp32."""
    ranks: int
    hosts: int = 1
    rows: int
    """Rows per micro-batch and rank."""
    length: int
    """Tokens per row."""
    accumulation: int = 1
    """Micro-batches per step."""
    checkpointing: bool = False
    trains: bool = True
    """False: only gates are trained."""
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket: int = 500_000_000
    """DeepSpeed's reduce_bucket_size, in numbers; this is its default."""
    live: int = 1_000_000_000
    """DeepSpeed's stage3_max_live_parameters; this is its default."""
    teacher: int = 0
    """Parameters of a teacher beside the model."""
    teaches: bool = False
    """Whether there is a teacher; it may be the model itself."""

    @property
    def width(self) -> int:
        return 2 if self.half else 4

    @property
    def tokens(self) -> int:
        """Per micro-batch and rank."""
        return self.rows * self.length


@dataclass(frozen=True, kw_only=True)
class Card:
    """An accelerator, or the share of a CPU that a rank has."""

    name: str
    memory: float
    """Bytes."""
    half: float
    """FLOP/s of large dense products in half precision, with fp32 accumulation."""
    single: float
    """The same in fp32."""
    bandwidth: float
    """Bytes per second, from and to its memory."""
    link: float
    """Bytes per second and direction to the other cards of the host."""
    share: float = 1.0
    """The share of these rates that training reaches."""
    attention: float = 0.5
    """The speed of fused attention, as a share of that of large products."""
    update: float | None = None
    """Bytes per second of Adam; None: `bandwidth`."""
    copies: float | None = None
    """Bytes per second of copies into new memory, which gradients take on their way; None: `bandwidth`."""
    loss: float | None = None
    """Bytes per second of the loss, whose logits are new memory in every step; None: `bandwidth`."""
    latency: float = 2e-5
    """Seconds per collective."""
    launch: float = 5e-4
    """Seconds that PyTorch needs to start the kernels of one block, forward and backward: about 70 of about 7 µs. Small
    models are bound by it. 0 for a CPU, whose rates are measured with it."""
    overlaps: bool = True
    """Whether ZeRO 3 gathers weights while the card computes."""
    shares_memory: bool = False
    """Whether what is offloaded to the host stays in the same memory: a CPU."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank."""

    state: float
    """Weights, gradients and optimizer states on the device."""
    host: float
    """What is offloaded to the host."""
    activations: float
    """Kept by the forward pass of a micro-batch, with the setting of checkpointing."""
    kept: float
    """The same without checkpointing."""
    checkpointed: float
    """The same with checkpointing."""
    buffers: float
    """DeepSpeed's buckets and, at ZeRO 3, gathered weights."""
    peak: float
    """The largest sum at any moment of a step."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The plan of one stage on one kind of card."""

    memory: Memory
    sent: float
    """Bytes that a rank sends per step."""
    seconds: float | None = None
    """Per step; None: no card is stated."""
    tokens_per_second: float | None = None
    """All ranks together."""


def estimate(shape: Shape, setup: Setup, card: Card | None = None, *, network: float | None = None) -> Estimate:
    """The plan of a stage.

    Args:
        shape: The model that is trained.
        setup: How.
        card: What each rank runs on; None: no times.
        network: Bytes per second and direction of a host's network, all its adapters together; None: one host.
    """
    sent = communication(shape, setup)
    memory = memory_of(shape, setup, shared=card is not None and card.shares_memory)
    if card is None:
        return Estimate(memory=memory, sent=sum(sent))
    seconds = step_seconds(shape, setup, card, network=network)
    tokens = setup.tokens * setup.accumulation * setup.ranks
    return Estimate(memory=memory, sent=sum(sent), seconds=seconds, tokens_per_second=tokens / seconds)


def state_bytes(count: int, setup: Setup) -> tuple[float, float, float]:
    """Bytes per rank of weights, gradients and optimizer states of `count` parameters with Adam (ZeRO, sec. 3.1).

    Half precision needs 2 bytes per parameter for weights, 2 for gradients and 12 for masters and moments; fp32 needs
    4, 4 and 8 (and 4 for ZeRO's master copy). ZeRO 1 partitions the last, 2 also the gradients, 3 also the weights.
    """
    zero, ranks, width = setup.zero, setup.ranks, setup.width
    states = (12 if setup.half or zero else 8) * count if setup.trains else 0
    gradients = width * count if setup.trains else 0
    return (
        width * count / (ranks if zero >= 3 else 1),
        gradients / (ranks if zero >= 2 else 1),
        states / (ranks if zero >= 1 else 1),
    )


def activations(shape: Shape, setup: Setup, *, checkpointing: bool) -> float:
    """Bytes that the forward pass of a micro-batch keeps: without checkpointing everything, with it the layers' inputs
    and, while a layer is recomputed, what that layer keeps.

    Besides the layers: the embedding's result, the last norm, and a learned score bias, in fp32, once for all layers
    and rows, with a copy in which hidden keys are masked.
    """
    width = setup.width
    layers = [sum(block.kept(width=width, bias=shape.bias) for block in layer) for layer in shape.layers]
    ends = shape.hidden * (width + (2 * width if shape.bias else 4 + 2 * width))
    scores = 2 * 4 * shape.score_heads * setup.length**2
    inside = len(layers) * width * shape.hidden + max(layers, default=0) if checkpointing else sum(layers)
    return setup.tokens * (inside + ends) + scores


def memory_of(shape: Shape, setup: Setup, *, shared: bool = False) -> Memory:
    """Bytes on one rank: what lives through a step, and the largest sum at any of its moments.

    The moments are the begin of the backward pass, when all activations and the loss's temporaries live; with
    checkpointing, the time at which the first layer has been recomputed, without the loss's temporaries; the end, when
    all gradients live; and the update, for which DeepSpeed copies this rank's gradients, to fp32 if they are not. The
    loss needs three fp32 tensors as large as the logits: log-softmax, its gradient and the gradient of its input.

    Args:
        shape: The model.
        setup: How it is trained.
        shared: Whether the host's memory is the same memory.
    """
    width, count = setup.width, shape.parameters
    weights, gradients, states = state_bytes(count, setup)
    host, staging, on_card = 0.0, *_offload_buffers(shape, setup)
    if shared:
        on_card += staging
    elif setup.offload_optimizer:
        host, gradients, states = states + staging, 0.0, 0.0
    if setup.offload_param and not shared:
        host, weights = host + weights, 0.0
    kept = activations(shape, setup, checkpointing=False)
    checkpointed = activations(shape, setup, checkpointing=True)
    live = checkpointed if setup.checkpointing else kept
    loss = setup.tokens * shape.vocab * (12 + (2 * width if setup.teaches else 0))
    # The gradient of a tied embedding comes twice, to be added.
    head = width * shape.vocab * shape.hidden if setup.trains and shape.tied else 0
    layers = [setup.tokens * sum(block.kept(width=width, bias=shape.bias) for block in layer) for layer in shape.layers]
    recomputed = max(layers, default=0) if setup.checkpointing else 0
    moved = _gradients(count, setup, leave=setup.offload_optimizer and not shared)
    moments = (
        moved.carried + live - recomputed + loss,
        moved.carried + live,
        moved.whole + head + sum(layers[:1]),
        moved.update,
        2 * width * count - weights if setup.zero in (1, 2) else 0.0,  # the engine flattens the weights
    )
    static = weights + states + on_card + width * setup.teacher
    return Memory(
        state=static + gradients,
        host=host,
        activations=live,
        kept=kept,
        checkpointed=checkpointed,
        buffers=moved.buffers,
        peak=static + max(moments),
    )


def _offload_buffers(shape: Shape, setup: Setup) -> tuple[float, float]:
    """Bytes on the host and on the card that offloading the optimizer needs beside its states, by DeepSpeed's code.

    The host has this rank's part of the gradients in fp32. ZeRO 1 and 2 also have the new weights there, and on both
    sides a buffer as large as the largest weight, which is taken to be the embedding.
    """
    if not setup.offload_optimizer:
        return 0.0, 0.0
    gradients = 4 * (shape.parameters if setup.trains else 0) / setup.ranks
    if setup.zero == 3:
        return gradients, 0.0
    largest = setup.width * shape.vocab * shape.hidden
    return gradients + setup.width * shape.parameters / setup.ranks + largest, largest


class _Gradients(NamedTuple):
    """Bytes of gradients, of DeepSpeed's buffers for them, and of weights gathered for them, at several moments."""

    carried: float
    """When a backward pass begins."""
    whole: float
    """When the last one ends."""
    update: float
    buffers: float
    """What of this is buffers."""


def _gradients(count: int, setup: Setup, *, leave: bool) -> _Gradients:
    """How gradients move at each ZeRO stage, by DeepSpeed's code (`runtime/zero/stage_1_and_2.py`, `stage3.py`).

    ZeRO 0 flattens them for the all-reduce. ZeRO 1 and 2 copy them into a bucket and this rank's part out of it. ZeRO 3
    does so with a bucket that always exists, as does its part; weights that are gathered stay until
    `stage3_max_live_parameters` are. An update flattens this rank's part, and copies it to fp32.

    Args:
        count: Parameters.
        setup: How they are trained.
        leave: Whether gradients are moved to the host as they are reduced.
    """
    width, ranks = setup.width, setup.ranks
    trained = count if setup.trains else 0
    full = float(width * trained)
    own = 0.0 if leave else full / ranks
    copied = 0.0 if leave else own + (4 * trained / ranks if setup.half else 0)
    bucket = float(width * min(setup.bucket, trained))
    again = setup.accumulation > 1
    if setup.zero == 0:
        return _Gradients(carried=full * again, whole=full, update=full * (2 if ranks > 1 else 1), buffers=0.0)
    if setup.zero == 1:
        return _Gradients(carried=full * again, whole=full + own, update=own + copied, buffers=bucket)
    if setup.zero == 2:
        return _Gradients(carried=own * again, whole=bucket + own, update=own + copied, buffers=bucket)
    gathered = float(width * min(setup.live, count)) if ranks > 1 else 0.0
    always = bucket + own
    buffers = bucket + gathered
    return _Gradients(carried=always + gathered, whole=always + gathered, update=always + copied, buffers=buffers)


def communication(shape: Shape, setup: Setup) -> tuple[float, float]:
    """Bytes that a rank sends per step, for gradients and for weights, with ring algorithms.

    An all-reduce of n bytes sends 2·n·(R−1)/R, a reduce-scatter or an all-gather half of that. ZeRO 0 and 1 reduce the
    gradients once per step, 2 and 3 after every micro-batch. At 1 and 2 DeepSpeed all-reduces its buckets, though a
    rank keeps only its own part, and gathers the new weights; at 3 it scatters gradients, and gathers the weights for
    the forward and for the backward pass, or once for both if they are no more than `live`.
    """
    ring = (setup.ranks - 1) / setup.ranks
    trained = setup.width * (shape.parameters if setup.trains else 0) * ring
    weights = setup.width * shape.parameters * ring
    each = setup.accumulation
    return {
        0: (2 * trained, 0.0),
        1: (2 * trained, trained),
        2: (2 * trained * each, trained),
        3: (trained * each, weights * each * (2 if shape.parameters > setup.live else 1)),
    }[setup.zero]


def step_flops(shape: Shape, setup: Setup) -> tuple[float, float]:
    """FLOPs per step and rank of matrix products and of attention.

    Forward 2 per weight and token, backward 4, or 2 if weights are frozen (Kaplan et al., sec. 2.1). Attention: 4 per
    feature and pair of a query and a key, forward; 2.5 times as much backward, where the scores are recomputed (Dao et
    al. 2022, FlashAttention, sec. 3.1). Checkpointing adds a forward pass of the layers, a teacher one of its model.
    """
    weights = sum(block.weights for block in shape.blocks)
    logits = shape.vocab * shape.hidden
    again = 1 if setup.checkpointing else 0
    passes = 3 if setup.trains else 2
    teacher = (setup.teacher or shape.parameters) if setup.teaches else 0
    products = 2 * ((passes + again) * weights + passes * logits + teacher)
    pairs = 4 * setup.length * sum(block.inner for block in shape.blocks if block.keys)
    tokens = setup.tokens * setup.accumulation
    return tokens * products, tokens * pairs * (3.5 + again + (1 if setup.teaches else 0))


def step_seconds(shape: Shape, setup: Setup, card: Card, *, network: float | None = None) -> float:
    """Seconds per step: products, attention, memory traffic between them, communication, update, one after another.

    At ZeRO 3 an accelerator gathers weights while it computes.
    """
    products, attention = step_flops(shape, setup)
    rate = card.share * (card.half if setup.half else card.single)
    bandwidth = card.share * card.bandwidth
    passes = PASSES * 1.4 if setup.checkpointing else PASSES  # two of five are forward
    traffic = passes * setup.tokens * sum(b.kept(width=setup.width, bias=shape.bias) for b in shape.blocks)
    loss = LOSS_ACCESSES * 4 * setup.tokens * shape.vocab / (card.loss or bandwidth)
    compute = products / rate + attention / (rate * card.attention)
    compute += setup.accumulation * (traffic / bandwidth + loss)
    hooks = 2 if setup.zero == 3 else 1  # those of ZeRO 3, on every module, take about as long again
    compute = max(compute, setup.accumulation * len(shape.blocks) * card.launch * hooks)

    own = (shape.parameters if setup.trains else 0) / (setup.ranks if setup.zero else 1)
    update = 4 * ADAM_ACCESSES * own / (card.update or bandwidth)
    accesses = SHARDED_ACCESSES if setup.zero == 3 else GRADIENT_ACCESSES
    update += 4 * accesses * (shape.parameters if setup.trains else 0) / (card.copies or bandwidth)
    if setup.offload_optimizer and not card.shares_memory:
        update = 4 * ADAM_ACCESSES * own / HOST_BANDWIDTH + 2 * setup.width * own / HOST_LINK
    gradients, weights = communication(shape, setup)
    speed = min(card.link, network or card.link)
    calls = len(shape.blocks) * 3 * setup.accumulation if setup.zero == 3 else 3
    moved = gradients / speed, weights / speed + (calls * card.latency if setup.ranks > 1 else 0)
    if setup.zero == 3 and card.overlaps:
        return max(compute, sum(moved)) + update
    return compute + sum(moved) + update
