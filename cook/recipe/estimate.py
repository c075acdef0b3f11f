"""What a training step needs: memory per rank, communication, time. Arithmetic on a few dataclasses, without a model.

N parameters, w bytes per number (4 in fp32, 2 in half precision), R ranks, T tokens of a micro-batch, M hidden size.

Sources: Rajbhandari et al. 2020, ZeRO, sec. 3.1 and 7 (model state, communication volume); Korthikanti et al. 2022,
Reducing activation recomputation in large transformer models, sec. 4 (activations of a layer, term by term); Kaplan et
al. 2020, sec. 2.1 (2 FLOPs per weight and token forward, 4 backward); Patarasu and Yuan 2009 (ring all-reduce). Where
DeepSpeed does more than the theory needs, its code is the source, and the docstring says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from cook.pruning.counts import Kept, kept_shapes, parameters
from cook.pruning.units import PruningSpace, UnitGroup

USABLE = 0.92
"""The share of a card's memory that a plan fills. The rest is for the driver, the libraries and fragmentation."""
PASSES = 5
"""Memory accesses per number of a kept activation: read and written forward; read with its gradient, which is written
for the input, backward."""
LOSS_ACCESSES = 8
"""Accesses per fp32 logit: converted, log-softmax and its gradient."""
HOST_BANDWIDTH, HOST_LINK = 2e10, 2.5e10
"""Bytes per second of a rank's share of the host's memory, and between host and card (PCIe 4.0), for offloading."""
ADAM_ACCESSES = 7
"""Accesses per parameter in a fused Adam step: weight, gradient and two moments read, all but the gradient written."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """An attention or FFN block, in features per token."""

    layer: int
    weights: int
    """Entries of its matrices."""
    norms: int
    """Features of its norms of hidden states, together."""
    head_norms: int = 0
    """Features of its norms of queries and keys."""
    inner: int
    """Inputs of its output projection: features of all heads, or FFN dimensions."""
    keys: int = 0
    """Features of the keys, and of the values; 0 in an FFN."""
    inputs: int = 1
    """Products with the hidden states that an FFN begins with: 2 if it is gated."""
    gates: int = 0
    """Features that masks multiply."""

    def kept(self, *, width: int, bias: bool) -> int:
        """Bytes per token that the forward pass keeps for the backward pass (Korthikanti et al., sec. 4.1).

        A norm keeps its input and its result; an RMSNorm without a fused kernel computes in fp32 and keeps the
        normalized input too. Attention keeps queries, keys, values and its result, and no scores. An FFN keeps the
        input of its activation and its result, and a gated one the other product and their product. (ReLU keeps only
        its result, GPT-2's GELU six tensors; eager attention, as in Gemma 2, also keeps the scores.)

        Args:
            width: Bytes per number.
            bias: Whether norms have a bias: a LayerNorm, which is fused.
        """
        norms = self.norms * (2 * width if bias else 4 + 2 * width) + self.head_norms * (4 + width)
        inner = 2 * self.inner + 2 * self.keys if self.keys else 2 * self.inputs * self.inner
        return norms + width * (inner + self.gates)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the arithmetic needs to know about a model."""

    parameters: int
    hidden: int
    vocab: int
    """Rows of the output projection; 0 without one."""
    tied: bool
    """Whether it is the input embedding, too."""
    bias: bool
    """Whether norms have a bias."""
    blocks: tuple[Block, ...]
    score_heads: int = 0
    """Heads with a learned bias, which is added to the scores of all layers; 0: none."""

    @property
    def layers(self) -> list[list[Block]]:
        """Blocks by layer."""
        return [[block for block in self.blocks if block.layer == n] for n in sorted({b.layer for b in self.blocks})]


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
    """Bytes per second of the update; None: `bandwidth`."""
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


def shape_of(
    space: PruningSpace, kept: Kept | None = None, *, score_bias: bool = False, gated: Collection[str] = ()
) -> Shape:
    """Reads a model's shape from its pruning space.

    Args:
        space: The pruning space.
        kept: Units that each group keeps.
        score_bias: Whether a learned bias per head is added to the attention scores.
        gated: The kinds of units that masks multiply.
    """
    shapes = kept_shapes(space, kept or {})
    groups = [group for group in (*space.groups, *space.unprunable) if group.kind in ("heads", "dimff")]
    found = [(group, _block(space, group, shapes, gated)) for group in groups if group.slices[-1].path in shapes]
    blocks = sorted((block for _, block in found), key=lambda block: block.layer)
    heads = [b.inner * g.members // g.slices[-1].block for g, b in found if g.kind == "heads"]
    logits = shapes.get(space.logits_weight, (0, 0))
    return Shape(
        parameters=parameters(space, kept),
        hidden=logits[1],
        vocab=logits[0],
        tied=sum(shape == logits for shape in shapes.values()) == 1,
        bias=any(f"{path.removesuffix('weight')}bias" in shapes for path in _norms(shapes)),
        blocks=tuple(blocks),
        score_heads=max(heads, default=0) if score_bias else 0,
    )


def _norms(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [path for path, shape in shapes.items() if len(shape) == 1 and path.endswith("weight")]


def _block(
    space: PruningSpace, group: UnitGroup, shapes: Mapping[str, tuple[int, ...]], gated: Collection[str]
) -> Block:
    block, out = space.block(group), group.slices[-1]
    inside = {piece.path: shapes[piece.path] for piece in block.slices if piece.path in shapes}
    matrices = {path: prod(shape) for path, shape in inside.items() if len(shape) == 2}
    inner = shapes[out.path][out.dim]
    hidden = matrices[out.path] // inner if inner else 1
    outputs = (sum(matrices.values()) - matrices[out.path]) // hidden  # queries, keys, values; or gate and up
    attends = group.kind == "heads"
    keys = (outputs - inner) // 2 if attends else 0
    norms = [inside[path] == (hidden,) for path in _norms(inside)]
    return Block(
        layer=group.layer,
        weights=sum(matrices.values()),
        norms=hidden * sum(norms),
        head_norms=inner + keys if not all(norms) else 0,  # norms of queries and of keys come in pairs
        inner=inner,
        keys=keys,
        inputs=1 if attends else outputs // max(1, inner),
        gates=(inner if group.kind in gated else 0) + (hidden if "layer" in gated else 0),
    )


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

    The moments are the begin of the backward pass, when all activations and the loss's temporaries live; its end, when
    all gradients do; and the update, for which DeepSpeed copies this rank's gradients, to fp32 if they are not. The
    loss needs three fp32 tensors as large as the logits: log-softmax, its gradient and the gradient of its input.

    Args:
        shape: The model.
        setup: How it is trained.
        shared: Whether the host's memory is the same memory.
    """
    width, count, zero, ranks = setup.width, shape.parameters, setup.zero, setup.ranks
    trained = count if setup.trains else 0
    weights, gradients, states = state_bytes(count, setup)
    host = (states + gradients if setup.offload_optimizer else 0) + (weights if setup.offload_param else 0)
    if setup.offload_optimizer and not shared:
        states = gradients = 0.0
    if setup.offload_param and not shared:
        weights = 0.0
    leaves = setup.offload_optimizer and not shared  # gradients go to the host as they are reduced
    bucket = width * min(setup.bucket, trained)
    gathered = width * min(setup.live, count) if zero == 3 and ranks > 1 else 0
    full, own = width * trained, 0 if leaves else width * trained / ranks  # gradients
    copied = 0 if leaves else own + (4 * trained / ranks if setup.half else 0)  # flattened, and in fp32

    static = weights + states + width * setup.teacher
    kept = activations(shape, setup, checkpointing=False)
    checkpointed = activations(shape, setup, checkpointing=True)
    live = checkpointed if setup.checkpointing else kept
    loss = setup.tokens * shape.vocab * (12 + (2 * width if setup.teaches else 0))
    head = width * shape.vocab * shape.hidden if setup.trains and shape.tied else 0  # a second gradient, to be added
    if zero == 0:
        buffers, carried, ends, update = 0, full if setup.accumulation > 1 else 0, full + head, full
        update += full if ranks > 1 else 0
    elif zero == 1:
        buffers, carried, ends = bucket, full if setup.accumulation > 1 else 0, full + own + head
        update = own + copied
    elif zero == 2:
        buffers, carried, ends = bucket, own if setup.accumulation > 1 else 0, bucket + own + head
        update = own + copied
    else:
        buffers, carried, ends = bucket + gathered, bucket + own, bucket + own + gathered + head
        update = bucket + own + copied
        carried += gathered
    last = max((sum(b.kept(width=width, bias=shape.bias) for b in layer) for layer in shape.layers[:1]), default=0)
    moments = (
        carried + live + loss,
        ends + setup.tokens * last,
        update,
        2 * width * count - weights if zero in (1, 2) else 0,  # the engine flattens the weights
    )
    return Memory(
        state=weights + gradients + states + width * setup.teacher,
        host=0.0 if shared else host,
        activations=live,
        kept=kept,
        checkpointed=checkpointed,
        buffers=buffers,
        peak=static + max(moments),
    )


def communication(shape: Shape, setup: Setup) -> tuple[float, float]:
    """Bytes that a rank sends per step, for gradients and for weights, with ring algorithms.

    An all-reduce of n bytes sends 2·n·(R−1)/R, a reduce-scatter or an all-gather half of that. ZeRO 0 and 1 reduce the
    gradients once per step, 2 and 3 after every micro-batch. At 1 and 2 DeepSpeed all-reduces its buckets, though a
    rank keeps only its own part, and gathers the new weights; at 3 it scatters gradients, and gathers the weights for
    the forward and for the backward pass.
    """
    ring = (setup.ranks - 1) / setup.ranks
    trained = setup.width * (shape.parameters if setup.trains else 0) * ring
    weights = setup.width * shape.parameters * ring
    each = setup.accumulation
    return {
        0: (2 * trained, 0.0),
        1: (2 * trained, trained),
        2: (2 * trained * each, trained),
        3: (trained * each, 2 * weights * each),
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
    traffic = PASSES * setup.tokens * sum(b.kept(width=setup.width, bias=shape.bias) for b in shape.blocks)
    traffic *= 1.4 if setup.checkpointing else 1  # two of five accesses are forward
    traffic += LOSS_ACCESSES * 4 * setup.tokens * shape.vocab
    compute = products / rate + attention / (rate * card.attention) + setup.accumulation * traffic / bandwidth
    hooks = 2 if setup.zero == 3 else 1  # those of ZeRO 3, on every module, take about as long again
    compute = max(compute, setup.accumulation * len(shape.blocks) * card.launch * hooks)

    own = (shape.parameters if setup.trains else 0) / (setup.ranks if setup.zero else 1)
    update = 4 * ADAM_ACCESSES * own / (card.update or bandwidth)
    if setup.offload_optimizer and not card.shares_memory:
        update = 4 * ADAM_ACCESSES * own / HOST_BANDWIDTH + 2 * setup.width * own / HOST_LINK
    gradients, weights = communication(shape, setup)
    speed = min(card.link, network or card.link)
    calls = len(shape.blocks) * 3 * setup.accumulation if setup.zero == 3 else 3
    moved = gradients / speed, weights / speed + (calls * card.latency if setup.ranks > 1 else 0)
    if setup.zero == 3 and card.overlaps:
        return max(compute, sum(moved)) + update
    return compute + sum(moved) + update


def largest_rows(shape: Shape, setup: Setup, card: Card, *, batch: int) -> int | None:
    """The largest micro-batch that fits on the card and divides a rank's share of the batch; None: not even one row.

    Args:
        shape: The model.
        setup: How it is trained; its rows and accumulation do not matter.
        card: What each rank runs on.
        batch: Rows per step, over all ranks.
    """
    share = max(1, batch // setup.ranks)
    for rows in (n for n in range(share, 0, -1) if share % n == 0):
        tried = _with_rows(setup, batch, rows)
        if memory_of(shape, tried, shared=card.shares_memory).peak <= USABLE * card.memory:
            return rows
    return None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A stage to be fitted on a card."""

    shape: Shape
    setup: Setup
    batch: int
    """Rows per step, over all ranks."""
    steps: int


def suggest(stages: Sequence[Planned], card: Card, *, network: float | None = None) -> Setup | None:
    """The ZeRO stage, checkpointing and micro-batch with which the stages together are fastest; None: nothing fits.

    The micro-batch is the largest that fits in all stages. Among setups whose times differ by less than 5%, it is the
    one with the lowest ZeRO stage. Optimizer states are offloaded only if nothing fits without.
    """
    first = stages[0].setup
    for offloaded in (False, True):
        best: tuple[float, Setup] | None = None
        levels = range(1 if first.half or offloaded else 0, 4)
        for zero in levels if first.ranks > 1 else levels[:1]:
            for checkpointing in (False, True):
                options = {"zero": zero, "checkpointing": checkpointing, "offload_optimizer": offloaded}
                tried = [replace(stage, setup=replace(stage.setup, **options)) for stage in stages]
                rows = [largest_rows(one.shape, one.setup, card, batch=one.batch) or 0 for one in tried]
                if all(rows):
                    fitted = [replace(one, setup=_with_rows(one.setup, one.batch, min(rows))) for one in tried]
                    seconds = sum(s.steps * step_seconds(s.shape, s.setup, card, network=network) for s in fitted)
                    # Simpler setups come first; a gain that is smaller than the estimate's error is none.
                    if best is None or seconds < 0.95 * best[0]:
                        best = (seconds, fitted[0].setup)
        if best:
            return best[1]
    return None


def _with_rows(setup: Setup, batch: int, rows: int) -> Setup:
    """The same with micro-batches of `rows` rows, or fewer if the rank's share of the batch does not divide."""
    share = max(1, batch // setup.ranks)
    rows = max(n for n in range(1, min(rows, share) + 1) if share % n == 0)
    return replace(setup, rows=rows, accumulation=share // rows)
