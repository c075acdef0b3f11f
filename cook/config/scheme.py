"""The sections of the scheme `l0_pruning.json`: what the masks look like before and after, and where they are kept."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args

from cook.config.declare import Limits, MaskPath, Share, Size, UserPath

StageName = Literal[
    "pretrain",
    "layer_mask",
    "layer_finetune",
    "att_mask",
    "att_finetune",
    "ffn_mask",
    "ffn_finetune",
    "joint_mask",
    "joint_finetune",
    "pattern",
    "random_baseline",
]
"""The stages of the recipe, each a training run of its own."""

STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)

MaskMethod = Literal["coarse-grained", "fine-grained", "joint", "pattern", "m4n2_1d", "m4n2_2d"]
"""`coarse-grained` prunes whole attention and FFN blocks, `fine-grained` prunes heads or FFN dims inside them, `joint`
all at once; `pattern` prunes single weights in a pattern, `m4n2_1d` and `m4n2_2d` two of four weights."""

PATTERN_METHODS: tuple[MaskMethod, ...] = ("pattern", "m4n2_1d", "m4n2_2d")
"""The methods that prune single weights."""

PatternScore = Literal["taylor_w2", "taylor", "magnitude"]
"""What a weight is worth, from its value and its gradient."""

NUMBERED = (
    "whole_head",
    "head_size",
    "granularity",
    "joint_qkv",
    "vector_wise",
    "block_wise",
    "local_kn",
    "tile_wise_k",
    "tile_wise_kn",
)
"""The patterns of types 0 to 8."""
NAMES = (*NUMBERED, "unstructured", "m4n2_1d", "m4n2_2d")
"""All patterns."""

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

    coarse_mask: MaskPath
    """Layer mask file: written when learned, read when fixed."""

    target_sparsity: Share
    """Share of the parameters of all attention and FFN blocks to remove."""


@dataclass(frozen=True, kw_only=True)
class FineConfig:
    """The scheme's `fine-grained` section: heads and FFN dims inside the kept blocks."""

    train_mask: bool
    """True: the mask is learned together with the weights. False: it is read, made binary and fixed (finetuning)."""

    coarse_mask: MaskPath | None = None
    """Layer mask file that says which blocks are kept. None only if the model's layers are already physically
    removed."""

    num_heads: Size
    """Attention heads per block before pruning."""

    dim_ff: Size
    """FFN dims per block before pruning."""

    target_num_heads: Size
    """Heads that every kept attention block ends with."""

    target_dimff: Size
    """Dims that every kept FFN block ends with."""

    head_unit: HeadUnitChoice = "auto"
    """Unit of removal where query heads share keys and values. `kv_group`: a key-value head with all its query heads;
    `query_head`: query heads, equally many from each group; `auto`: groups if `target_num_heads` is a multiple of their
    size, else query heads."""

    allow_remote_code: bool = False
    """True: the targets may lead to a model that the family's stock class cannot hold. It is then exported with a
    modeling file of its own."""

    heads_mask: MaskPath | None = None
    """Head mask file: written by att mask training, read by all later stages."""

    dimff_mask: MaskPath | None = None
    """FFN mask file: written by ffn mask training, read by all later stages."""

    scope: Scope = "block"
    """`block`: every kept block ends with the targets; `global`: the blocks share as many heads (or dims) as the
    targets would leave in all, and end uneven."""

    prune_mode: PruneMode
    """What the described stage prunes: `att`: heads; `ffn`: FFN dims."""


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """The scheme's `joint` section: heads, dims and, where wanted, blocks in one stage.

    Sizes, targets and mask files are those of `fine-grained`.
    """

    train_mask: bool
    """True: the masks are learned together with the weights. False: they are read and fixed (finetuning)."""

    scope: Scope = "block"
    """`block`: every kept block ends with the targets of `fine-grained`; `global`: one budget for all heads and dims of
    the model, whose blocks end uneven."""

    target_sparsity: Share | None = None
    """Scope `block`: share of the blocks' parameters to remove as whole blocks. None: all blocks stay."""

    target_params: Share | None = None
    """Scope `global`: share of the parameters of all heads and dims to keep. Where this and `target_flops` are None: as
    many as even blocks would have with the targets of `fine-grained`."""

    target_flops: Share | None = None
    """Scope `global`: share of the forward FLOPs per token of all heads and dims to keep."""

    flops_length: Size | None = None
    """Keys that a query attends to, for `target_flops`. None: `data.max_length`."""


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """The scheme's optional `gates` section: how masks are learned."""

    relaxation: RelaxationName = "auto"
    """What a gate is during learning. `deterministic`: a number from 0 to 1, made binary at the end by a concave term;
    `hard_concrete`: a noisy sample of the L0 distribution; `auto`: hard concrete where only blocks are learned, else
    deterministic."""

    learning_rate: Annotated[
        float | None,
        Limits(
            title='a number above 0 and up to 100, or "auto"',
            type=["number", "string"],
            exclusiveMinimum=0,
            maximum=100,
            pattern="^auto$",
            default="auto",
        ),
    ] = None
    """Learning rate of the gates. "auto": chosen by the number of steps of the stage."""

    ramp: Annotated[
        float | None,
        Limits(
            title='a number from 0 to 1, or "auto"',
            type=["number", "string"],
            minimum=0,
            maximum=1,
            pattern="^auto$",
            default="auto",
        ),
    ] = None
    """Fraction of the stage's steps in which the target rises from 0 to its final value. "auto": 0.4 for
    deterministic gates, 0.6 for hard concrete ones."""

    concavity: Annotated[float, Limits(minimum=0, maximum=100)] = 2.0
    """Deterministic gates: final weight of the concave term, in root mean squares of a gate's gradient. In the last
    steps it grows beyond this without bound."""

    initial_log_alpha: Annotated[float, Limits(minimum=-4.6, maximum=4.6)] = 3.0
    """Hard concrete gates: log_alpha before the first step. With 3 a gate is almost surely open."""

    start: GatesStart = "open"
    """`open`: all gates start alike. `taylor`, `fisher`: all gates stay open for the first `start_steps`, then start by
    the rank of a score of the gradients gathered in these steps."""

    start_steps: Annotated[int, Limits(minimum=1, maximum=10**5)] = 8
    """Steps in which the score is gathered, at most a quarter of the stage."""


PatternType = Annotated[int | str, Limits(enum=[*range(len(NUMBERED)), *NAMES])]


@dataclass(frozen=True, kw_only=True)
class Quirks:
    """Behaviours of the original system, each off by default: off is the corrected behaviour."""

    input_row_heads: bool = False
    """Types 0 and 1: group the input rows of query, key and value, each by itself, so that no head disappears.
    Corrected: a head is its output columns of the three and its input rows of the attention output, scored and removed
    together."""

    per_dimension_sparsity: bool = False
    """Type 8: s is what each of the two dimensions loses, 1 − (1 − s)² in all.
    Corrected: s is what the whole network loses, to the nearest row tile."""

    raw_width_norms: bool = False
    """Type 8: column norms are divided by K and row-tile norms by the tile's raw width, which over-prunes wide
    matrices. Corrected: root mean squares over the kept width."""

    revive: bool = False
    """Types 4 and 8: what an earlier stage pruned can come back, by a tie at zero or by tile cuts that moved.
    Corrected: pruned stays pruned."""

    vector_keeps_all: bool = False
    """Type 4: a sparsity that leaves less than one weight of a vector keeps the whole vector.
    Corrected: at least one weight is kept."""

    whole_percents: bool = False
    """The sparsity is cut down to a whole number: 62.5 means 62. Corrected: fractions count."""

    drifting_weights: bool = False
    """Masks hold the gradients only: pruned weights drift under weight decay and stale moments.
    Corrected: gradients, moments and weights of pruned entries are exactly 0."""

    empty_ratio_fails: bool = False
    """A matrix that ends empty ends the run: the ratio of its size to what is left divides by zero.
    Corrected: it is reported as 100% pruned."""

    total_of_stage: bool = False
    """The total reduction that is reported is the stage's own. Corrected: it is against the dense model."""

    schedule_goes_on: bool = False
    """The recovery's learning rate starts at the scoring steps' count, and reaches 0 too early.
    Corrected: each stage's recovery has its own full schedule."""

    @classmethod
    def historical(cls) -> Quirks:
        """All of them on: the original system's behaviour."""
        return cls(**{field.name: True for field in fields(cls)})


QuirkName = Annotated[str, Limits(enum=[field.name for field in fields(Quirks)])]


@dataclass(frozen=True, kw_only=True)
class PatternConfig:
    """The `pattern` section of `bmcook.json`: which single weights go, and how they are scored."""

    type: PatternType
    """0 to 8, or the pattern's name."""

    sparsity: Annotated[float, Limits(minimum=0, maximum=100)]
    """Percent of the weights of the matrices in `pruned_module` to remove."""

    granularity: Size = 128
    """Columns per tile."""

    local_granularities: tuple[Size, Size] = (32, 128)
    """Type 6: columns per tile of query, key and value, and of the other matrices."""

    block: Size = 32
    """Type 5: side of a block."""

    vector: Size = 16
    """Type 4: rows per vector."""

    score: PatternScore = "taylor_w2"
    """`taylor_w2`: (g·W²)²; `taylor`: (g·W)²; `magnitude`: |W|."""

    scoring_steps: Size = 100
    """Batches whose gradients are gathered with the weights frozen. `magnitude` needs none."""

    previous_mask: UserPath | None = None
    """Mask file of an earlier stage: what it prunes stays pruned."""

    quirks: Annotated[tuple[QuirkName, ...], Limits(maxItems=20)] = ()
    """Historical behaviours to repeat, by their names."""
