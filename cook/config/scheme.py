"""The sections of the scheme `l0_pruning.json`: what the masks look like before and after, and where they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cook.config.corpus import UserPath

MaskMethod = Literal["coarse-grained", "fine-grained", "joint", "pattern", "m4n2_1d", "m4n2_2d"]
"""`coarse-grained` prunes whole attention and FFN blocks, `fine-grained` prunes heads or FFN dims inside them, `joint`
all at once; `pattern` prunes single weights in a pattern, `m4n2_1d` and `m4n2_2d` two of four weights."""

PATTERN_METHODS: tuple[MaskMethod, ...] = ("pattern", "m4n2_1d", "m4n2_2d")
"""The methods that prune single weights."""

PatternScore = Literal["taylor_w2", "taylor", "magnitude"]
"""What a weight is worth, from its value and its gradient."""

PruneMode = Literal["att", "ffn"]
"""Which units a fine-grained stage prunes: attention heads or FFN dims."""


RelaxationName = Literal["auto", "deterministic", "hard_concrete"]
"""What stands for a 0/1 mask while it is learned."""

GatesStart = Literal["open", "taylor", "fisher"]
"""How gates begin."""

HeadUnitChoice = Literal["auto", "kv_group", "query_head"]
"""What a unit of attention is where query heads share keys and values."""

Scope = Literal["block", "global"]
"""Over what a budget is held: `block`, every block ends with the same number of units; `global`, one budget for all
blocks, which come out uneven."""


@dataclass(frozen=True, kw_only=True)
class CoarseConfig:
    """The scheme's `coarse-grained` section: whole attention and FFN blocks."""

    train_mask: bool
    """True: the mask is learned together with the weights. False: it is read, made binary and fixed (finetuning)."""

    coarse_mask: UserPath
    """Mask file (`.pt`): written when learned, read when fixed."""

    target_sparsity: float
    """Share of the blocks' parameters to remove, between 0 and 1."""


@dataclass(frozen=True, kw_only=True)
class FineConfig:
    """The scheme's `fine-grained` section: heads and FFN dims inside the kept blocks."""

    train_mask: bool
    """True: the mask is learned together with the weights. False: it is read, made binary and fixed (finetuning)."""

    coarse_mask: UserPath | None = None
    """Layer mask that says which blocks are kept. None: the model's layers are already physically removed."""

    num_heads: int
    """Attention heads of a block before pruning."""

    dim_ff: int
    """FFN dims of a block before pruning."""

    target_num_heads: int
    """Heads that every kept attention block ends with."""

    target_dimff: int
    """Dims that every kept FFN block ends with."""

    head_unit: HeadUnitChoice = "auto"
    """`kv_group`: a key-value head goes with all its query heads; `query_head`: query heads go, as many from each
    group; `auto`: groups if `target_num_heads` is a multiple of their size, else query heads."""

    allow_remote_code: bool = False
    """True: the targets may be such that the family's stock class cannot hold the result, which is then exported with
    a modeling file of its own."""

    heads_mask: UserPath | None = None
    """Head mask file (`.pt`): written by att mask training, read by everything after it."""

    dimff_mask: UserPath | None = None
    """FFN mask file (`.pt`): written by ffn mask training, read by everything after it."""

    scope: Scope = "block"
    """`global`: the blocks share the heads (or dims) that they would have with the targets, and come out uneven."""

    prune_mode: PruneMode
    """Which of the two the described stage prunes."""


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """The scheme's `joint` section: heads, dims and, where wanted, blocks in one stage.

    Sizes, targets and mask files are those of `fine-grained`.
    """

    train_mask: bool
    """True: the masks are learned together with the weights. False: they are read and fixed (finetuning)."""

    scope: Scope = "block"
    """`block`: every kept block ends with `target_num_heads` heads or `target_dimff` dims; `global`: one budget for
    all heads and dims of the model."""

    target_sparsity: float | None = None
    """Scope `block`: share of the blocks' parameters to remove as whole blocks, between 0 and 1. None: all stay."""

    target_params: float | None = None
    """Scope `global`: share of the parameters of all heads and dims to keep, between 0 and 1. None, as well as
    `target_flops`: as many parameters as even blocks would have with the targets of `fine-grained`."""

    target_flops: float | None = None
    """Scope `global`: share of the forward FLOPs a token of all heads and dims to keep, between 0 and 1."""

    flops_length: int | None = None
    """Keys that a query attends to, for `target_flops`. None: `data.max_length`."""


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """The scheme's optional `gates` section: how masks are learned."""

    relaxation: RelaxationName = "auto"
    """What a gate is while it is learned: `deterministic`, a number from 0 to 1 that a concave term makes binary in
    the end; `hard_concrete`, the L0 distribution's noisy samples; `auto`: hard concrete where only blocks are learned,
    of which there are few and each weighs much, else deterministic."""

    learning_rate: float | None = None
    """Learning rate of the gates. None ("auto"): chosen by the number of steps of the stage."""

    ramp: float | None = None
    """Fraction of the stage's steps in which the target rises from 0 to its final value. None ("auto"): 0.4 for
    deterministic gates, 0.6 for hard concrete ones."""

    concavity: float = 2.0
    """Of deterministic gates: what the weight of the term that makes them binary grows to, in root mean squares of a
    gate's gradient, before it grows without bound in the last steps."""

    initial_log_alpha: float = 3.0
    """Of hard concrete gates: log_alpha before the first step; 3 is a gate that is almost surely open."""

    start: GatesStart = "open"
    """`taylor`, `fisher`: all gates stay open for the first `start_steps`, then start by the rank of a score of the
    gradients gathered meanwhile; `open`: all start alike."""

    start_steps: int = 8
    """Steps that gather the score, at most a quarter of the stage."""


@dataclass(frozen=True, kw_only=True)
class PatternConfig:
    """The `pattern` section of `bmcook.json`: which single weights go, and how they are scored."""

    type: int | str
    """0 to 8, or the pattern's name."""

    sparsity: float
    """Percent of the weights of the matrices in `pruned_module` to remove."""

    granularity: int = 128
    """Columns of a tile."""

    local_granularities: tuple[int, ...] = (32, 128)
    """Columns of a tile of type 6: of query, key and value, and of the other matrices."""

    block: int = 32
    """Side of a block of type 5."""

    vector: int = 16
    """Rows of a vector of type 4."""

    score: PatternScore = "taylor_w2"
    """`taylor_w2`: (g·W²)²; `taylor`: (g·W)²; `magnitude`: |W|."""

    scoring_steps: int = 100
    """Batches whose gradients are gathered with the weights frozen; `magnitude` needs none."""

    previous_mask: UserPath | None = None
    """Mask file of an earlier stage: what it prunes stays pruned."""

    quirks: tuple[str, ...] = ()
    """Historical behaviours to repeat, by their names."""
