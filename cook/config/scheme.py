"""The sections of the pruning scheme `l0_pruning.json`, and the `pattern` section of `bmcook.json`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args

from cook.config.declare import Count, Limits, MaskPath, Positive, Share, Size, UserPath

StageName = Literal[
    "pretrain",
    "layer_mask",
    "layer_finetune",
    "att_mask",
    "att_finetune",
    "ffn_mask",
    "ffn_finetune",
    "headdim_mask",
    "headdim_finetune",
    "experts_mask",
    "experts_finetune",
    "hidden_mask",
    "hidden_finetune",
    "joint_mask",
    "joint_finetune",
    "pattern",
    "quantize",
    "moefy",
    "random_baseline",
]
"""The possible stages of a recipe. Each is a separate training run."""
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)
MaskMethod = Literal["coarse-grained", "fine-grained", "joint", "pattern", "m4n2_1d", "m4n2_2d"]
"""See `PruningConfig.mask_method`."""
PATTERN_METHODS: tuple[MaskMethod, ...] = ("pattern", "m4n2_1d", "m4n2_2d")
"""The methods that prune single weights."""
PatternScore = Literal["taylor_w2", "taylor", "magnitude"]
"""How the importance of a weight is computed from its value and gradient."""
NUMBERED = tuple(
    "whole_head head_size granularity joint_qkv vector_wise block_wise local_kn tile_wise_k tile_wise_kn".split()
)
"""The patterns of types 0 to 8."""
NAMES = (*NUMBERED, "unstructured", "m4n2_1d", "m4n2_2d")
"""The names of all patterns."""
PruneMode = Literal["att", "ffn", "experts", "headdim", "hidden"]
"""Which units a fine-grained stage prunes: attention heads, FFN dims, experts, head dims, or hidden dims."""
PinnedUnits = Literal["heads", "dims"]
"""Units that may be left out of a global budget; others are in it only if they are asked for."""
RelaxationName = Literal["auto", "deterministic", "hard_concrete"]
"""The relaxation of a 0/1 mask while it is learned."""
GatesStart = Literal["open", "taylor", "fisher", "search"]
"""How gates are initialised."""
BlockUnit = Literal["block", "layer"]
"""What is removed at once in a search for blocks: an attention or FFN block, or all blocks of a layer."""
HeadUnitChoice = Literal["auto", "kv_group", "query_head"]
"""The unit of attention that is pruned if query heads share keys and values."""
Scope = Literal["block", "global"]
"""The scope of a budget. `block`: every block ends with the same number of units. `global`: one budget for all blocks,
which may end with different sizes."""


Shares = Annotated[
    Share | Annotated[tuple[Share, ...], Limits(minItems=2, maxItems=16)] | None,
    Limits(title="a number above 0, below 1; a list of 2 to 16 such numbers; or null"),
]
"""What one model keeps, or what each of several nested models keeps, in descending order."""


class NumberOrAuto(Limits):
    """JSON schema keywords of a number for which "auto", the default, is written instead."""

    def __init__(self, title: str, **limits: float):
        super().__init__(
            title=f'{title}, or "auto"', type=["number", "string"], **limits, pattern="^auto$", default="auto"
        )


@dataclass(frozen=True, kw_only=True)
class CoarseConfig:
    """The scheme's `coarse-grained` section: whole attention and FFN blocks."""

    train_mask: bool
    """True: the mask is learned together with the weights. False: it is read, made binary and fixed (finetuning)."""
    coarse_mask: MaskPath
    """Layer mask file. Written when the mask is learned, read when it is fixed."""
    target_sparsity: Share
    """Fraction of the parameters of all attention and FFN blocks to remove."""
    unit: BlockUnit = "block"
    """What a search (`gates.start`) removes at once. `block`: an attention or FFN block. `layer`: a whole layer; stock
    classes load the result."""


@dataclass(frozen=True, kw_only=True)
class FineConfig:
    """The scheme's `fine-grained` section: heads, experts and FFN dims inside the kept blocks, head and hidden dims."""

    train_mask: bool
    """True: the mask is learned together with the weights. False: it is read, made binary and fixed (finetuning)."""
    coarse_mask: MaskPath | None = None
    """Layer mask file with the blocks that are kept. None is possible only if the layers have already been physically
    removed from the model."""
    num_heads: Size
    """Attention heads per block before pruning."""
    dim_ff: Size
    """FFN dims per block before pruning; in a model with experts, dims of an expert."""
    target_num_heads: Size
    """Heads per kept attention block after pruning."""
    target_dimff: Size
    """FFN dims per kept FFN block after pruning; in a model with experts, dims that each expert keeps: a multiple of 8,
    since grouped kernels need it. The dims of dense FFN blocks of such a model stay."""
    target_experts: Size | None = None
    """Experts per kept FFN block after pruning, at least those that compute each token. None: all experts stay. If
    `joint` has scope `global`, experts are units of its budget, the dims inside them stay, and a `target_*` of `joint`
    determines how many experts stay."""
    target_hidden: Size | None = None
    """Hidden size after pruning. None: the hidden size stays. If `joint` has scope `global`, hidden dims are units of
    its budget, and a `target_*` of `joint` determines how many stay."""
    target_head_dim: Size | None = None
    """Dims per head after pruning, the same in all layers. None: they stay. Under rotary positions dims go in pairs, so
    it is even. If `joint` has scope `global`, head dims are units of its budget, and a `target_*` of `joint` determines
    how many stay."""
    round_to: Size = 1
    """The FFN dims per block and the hidden dims that stay are multiples of this number, such as 64 or 128, for fast
    kernels. The targets must be multiples too."""
    head_unit: HeadUnitChoice = "auto"
    """Unit that is removed if query heads share keys and values. `kv_group`: a key-value head with all of its query
    heads. `query_head`: query heads, the same number from each group; with scope `global` any of them, and a key-value
    head goes with the last of its query heads. `auto`: query heads if `joint` has scope `global`; else groups if
    `target_num_heads` is a multiple of the group size or the blocks share the number of heads; else query heads."""
    allow_remote_code: bool = False
    """True: the targets may lead to a model that the stock class of its family cannot represent. It is then exported
    together with its own modeling file."""
    heads_mask: MaskPath | None = None
    """Head mask file: written by att mask training, read by all later stages."""
    dimff_mask: MaskPath | None = None
    """FFN mask file: written by ffn mask training, read by all later stages."""
    head_dims_mask: MaskPath | None = None
    """Mask file of the head dims: written by headdim mask training, read by all later stages."""
    experts_mask: MaskPath | None = None
    """Mask file of the experts: written by experts mask training, read by all later stages."""
    hidden_mask: MaskPath | None = None
    """Mask file of the hidden dims: written by hidden mask training, read by all later stages."""
    scope: Scope = "block"
    """`block`: every kept block ends with the targets. `global`: the blocks share the total number of heads (or dims)
    that the targets give, and may end with different sizes."""
    prune_mode: PruneMode
    """The units that the described stage prunes. `att`: heads; `ffn`: FFN dims; `experts`: experts; `headdim`: head
    dims; `hidden`: hidden dims."""


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """The scheme's `joint` section: heads, dims and optionally blocks, experts, head and hidden dims in one stage.

    Sizes, targets and mask files are those of `fine-grained`.
    """

    train_mask: bool
    """True: the masks are learned together with the weights. False: they are read and fixed (finetuning)."""
    scope: Scope = "block"
    """`block`: every kept block ends with the targets of `fine-grained`. `global`: one budget for all heads and dims of
    the model, whose blocks may end with different sizes."""
    target_sparsity: Share | None = None
    """Scope `block`: fraction of the blocks' parameters to remove as whole blocks. None: all blocks stay."""
    blocks: bool = False
    """Scope `global`: whole attention and FFN blocks are units of the budget too."""
    pin: Annotated[tuple[PinnedUnits, ...], Limits(maxItems=2, uniqueItems=True)] = ()
    """Scope `global`: units that stay as they are, although there are others to remove."""
    target_params: Shares = None
    """Scope `global`: fraction of the parameters of all heads and dims to keep; of the whole model if blocks, head dims
    or hidden dims are among the units. If this and `target_flops` are None, the budget is the number of parameters
    of equal blocks with the targets of `fine-grained`. A list in descending order: nested masks of several sizes for
    the same weights, each in mask files of its own (`heads-0.5.pt`)."""
    target_flops: Shares = None
    """Scope `global`: fraction of the forward FLOPs per token of all heads and dims to keep; of the whole model as
    above. Or a list as above."""
    flops_length: Size | None = None
    """Number of keys that a query attends to, for `target_flops`. None: `data.max_length`."""
    target_latency: Positive | None = None
    """Scope `global`: milliseconds of a forward pass of the whole pruned model, by the times in `block_times`."""
    block_times: UserPath | None = None
    """The table that `cook profile` measured for this model on the machine that will run it; for `target_latency`."""
    target_memory: Positive | None = None
    """Scope `global`: MiB of the whole pruned model's weights and of the keys and values of `cache_length` tokens."""
    cache_length: Count | None = None
    """Tokens in the cache, all rows together, for `target_memory`. None: `data.max_length`."""
    number_bytes: Annotated[int, Limits(enum=[1, 2, 4])] = 2
    """Bytes per weight and per cached number, for `target_memory`."""

    @property
    def pinned(self) -> tuple[str, ...]:
        """The kinds of units in `pin`, by the names of `cook.pruning.units`."""
        return tuple({"dims": "dimff"}.get(name, name) for name in self.pin)

    @property
    def sizes(self) -> tuple[float, ...]:
        """The targets of several sizes, in descending order; empty if there is one size."""
        given = self.target_params if self.target_flops is None else self.target_flops
        return given if isinstance(given, tuple) else ()

    def share(self, number: int = 0) -> float | None:
        """The share of parameters or FLOPs that the size of this number keeps; None if neither is given."""
        given = self.target_params if self.target_flops is None else self.target_flops
        return given[number] if isinstance(given, tuple) else given


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """The scheme's optional `gates` section: how masks are learned."""

    relaxation: RelaxationName = "auto"
    """How gates are relaxed during learning. `deterministic`: a number from 0 to 1 that a concave term makes binary
    towards the end. `hard_concrete`: a random sample of the hard concrete (L0) distribution. `auto`: hard concrete if
    only blocks are learned, else deterministic."""
    learning_rate: Annotated[
        float | None, NumberOrAuto("a number above 0 and up to 100", exclusiveMinimum=0, maximum=100)
    ] = None
    """Learning rate of the gates. "auto": derived from the number of steps of the stage."""
    ramp: Annotated[float | None, NumberOrAuto("a number from 0 to 1", minimum=0, maximum=1)] = None
    """Fraction of the stage's steps over which the sparsity target rises from 0 to its final value. "auto": 0.4 for
    deterministic gates, 0.6 for hard concrete gates."""
    concavity: Annotated[float, Limits(minimum=0, maximum=100)] = 2.0
    """Deterministic gates: final weight of the concave term, in units of the root mean square of a gate's gradient. In
    the last steps it grows beyond this value without bound."""
    initial_log_alpha: Annotated[float, Limits(minimum=-4.6, maximum=4.6)] = 3.0
    """Hard concrete gates: log_alpha before the first step. With 3, a gate is almost always open."""
    start: GatesStart = "open"
    """`open`: all gates start with the same value. `taylor`, `fisher`: all gates stay open for the first `start_steps`
    steps, and then start with a value given by the rank of their score. The score is accumulated from the gradients of
    these steps. `search` (stages that learn blocks alone): before the first step, blocks are removed one after the
    other, each time the one whose removal raises the loss on the batches of the first `start_steps` steps least. The
    gates then stay as they are, and the stage's steps train weights only."""
    start_steps: Annotated[int, Limits(minimum=1, maximum=10**5)] = 8
    """Steps over which the score is accumulated, at most a quarter of the stage; whose batches a search measures; or
    whose tokens `compensation` averages over."""
    compensation: bool = False
    """True: what the removed heads and FFN dims add on average stays as a bias of the output projection of their block,
    as in FLAP. While gates are learned, they mix a unit's output with its mean over the batches of the first
    `start_steps` steps. The masks then belong to the model that their stage writes, whose biases contain the means. For
    models whose output projections have a bias, or whose class can add one (Llama: `attention_bias`, `mlp_bias`)."""


PatternType = Annotated[int | str, Limits(enum=[*range(len(NUMBERED)), *NAMES])]


@dataclass(frozen=True, kw_only=True)
class Quirks:
    """Behaviours of the original system, each off by default: off is the corrected behaviour."""

    input_row_heads: bool = False
    """Types 0 and 1: the input rows of query, key and value are grouped separately, so that no head disappears.
    Corrected: a head consists of its output columns in the three matrices and its input rows in the attention output,
    which are scored and removed together."""
    per_dimension_sparsity: bool = False
    """Type 8: s is the sparsity of each of the two dimensions, 1 − (1 − s)² in total.
    Corrected: s is the sparsity of the whole network, to the nearest row tile."""
    raw_width_norms: bool = False
    """Type 8: column norms are divided by K and row-tile norms by the tile's raw width, which over-prunes wide
    matrices. Corrected: root mean squares over the kept width."""
    revive: bool = False
    """Types 4 and 8: weights that an earlier stage pruned can come back, because of ties at zero or shifted tiles.
    Corrected: pruned weights stay pruned."""
    vector_keeps_all: bool = False
    """Type 4: a sparsity that leaves less than one weight per vector keeps the whole vector.
    Corrected: at least one weight is kept."""
    whole_percents: bool = False
    """The sparsity is truncated to a whole percentage: 62.5 means 62. Corrected: fractions are used."""
    drifting_weights: bool = False
    """Masks zero only the gradients: pruned weights drift because of weight decay and old optimizer moments.
    Corrected: gradients, moments and weights of pruned entries are exactly 0."""
    empty_ratio_fails: bool = False
    """The run fails if a matrix ends empty, because a ratio is divided by zero.
    Corrected: the matrix is reported as 100% pruned."""
    total_of_stage: bool = False
    """The reported total reduction is that of the stage. Corrected: it is relative to the dense model."""
    schedule_goes_on: bool = False
    """The learning rate schedule of the recovery starts after the scoring steps, and reaches 0 too early.
    Corrected: the recovery of each stage has its own full schedule."""

    @classmethod
    def historical(cls) -> Quirks:
        """Returns the behaviour of the original system: all quirks on."""
        return cls(**{field.name: True for field in fields(cls)})


QuirkName = Annotated[str, Limits(enum=[field.name for field in fields(Quirks)])]


@dataclass(frozen=True, kw_only=True)
class PatternConfig:
    """The `pattern` section of `bmcook.json`: which single weights are removed, and how they are scored."""

    type: PatternType
    """Number (0 to 8) or name of the pattern."""
    sparsity: Annotated[float, Limits(minimum=0, maximum=100)]
    """Percent of the weights of the matrices in `pruned_module` to remove."""
    granularity: Size = 128
    """Columns per tile."""
    local_granularities: tuple[Size, Size] = (32, 128)
    """Type 6: columns per tile, first for query, key and value, then for the other matrices."""
    block: Size = 32
    """Type 5: side length of a block, in weights."""
    vector: Size = 16
    """Type 4: rows per vector."""
    score: PatternScore = "taylor_w2"
    """`taylor_w2`: (g·W²)²; `taylor`: (g·W)²; `magnitude`: |W|."""
    scoring_steps: Size = 100
    """Steps with frozen weights over which the gradients for the scores are accumulated. Unused by `magnitude`."""
    previous_mask: UserPath | None = None
    """Mask file of an earlier stage. The weights that it prunes stay pruned."""
    quirks: Annotated[tuple[QuirkName, ...], Limits(maxItems=20)] = ()
    """Names of historical behaviours to reproduce."""
