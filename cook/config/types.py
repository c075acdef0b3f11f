"""What a run is told to do, as frozen dataclasses: one a section of `bmcook.json` and of the scheme `l0_pruning.json`.

A component receives its own section, never the whole `RunConfig`. The defaults here are the only ones: the JSON schemas
repeat them for the reader, and a test holds the two together. Paths are strings as the user wrote them; they are
relative to the current working directory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from cook.config.corpus import DataConfig
from cook.config.declare import Count, Fraction, KeysOf, Limits, Scale, Size, UserPath
from cook.config.distillation import DistillationConfig
from cook.config.scheme import (
    PATTERN_METHODS,
    STAGE_NAMES,
    CoarseConfig,
    FineConfig,
    GatesConfig,
    JointConfig,
    MaskMethod,
    PatternConfig,
    StageName,
)

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "linear", "constant"]
SpikeAction = Literal["off", "log", "skip", "stop"]
SpikeMeasure = Literal["gradient_norm", "loss"]
TokenizerType = Literal["sentencepiece", "hf", "jieba"]
ModelType = Literal["cpm_ant", "hf"]


MaskModules = Annotated[list[Annotated[list[bool], Limits(minItems=2, maxItems=2)]] | None, Limits(maxItems=10**5)]


@dataclass(frozen=True, kw_only=True)
class CpmLiveKeys:
    """CPM-Live's configuration of a model, as its authors publish it."""

    vocab_size: Size
    """Rows of the token embedding."""

    dim_model: Size
    """Width of the residual stream."""

    num_layers: Size
    """Layers, each one attention block and one FFN block."""

    num_heads: Size
    """Attention heads per block."""

    dim_head: Size
    """Width of a head."""

    dim_ff: Size
    """Inner width of an FFN block."""

    dropout_p: Annotated[float, Limits(minimum=0, exclusiveMaximum=1)] = 0.0
    """Dropout probability."""

    position_bias_num_buckets: Annotated[Size, Limits(multipleOf=4)]
    """Buckets of the relative position bias, half of them per direction; a multiple of 4."""

    position_bias_max_distance: Size
    """Distance from which on all positions share the last bucket."""

    eps: Annotated[float, Limits(exclusiveMinimum=0, maximum=1)]
    """Number added to the variance in the layer norms."""

    half: bool = True
    """CPM-Live's switch for half precision weights. Unused: see `training.precision`."""

    prompt_types: Annotated[Size, Limits(minimum=3)]
    """Kinds of prompt, one per task. That of the causal language model is number 2."""

    prompt_length: Size
    """Prompt embeddings in front of every row."""

    segment_types: Annotated[Size, Limits(minimum=3)]
    """Segment embeddings. The text of the causal language model is segment 2."""

    mask_modules: MaskModules = None
    """A pair [attention, FFN] per layer, true for a block that is physically removed. None: no block is."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to train or prune: a description, pretrained weights, or both."""

    type: ModelType
    """`cpm_ant`, or `hf`: the Hugging Face folder at `path`, of any family that has an adapter."""

    config: Annotated[
        dict[str, Any] | None,
        KeysOf(CpmLiveKeys),
        Limits(
            title="CPM-Live's keys, the path of a JSON file, or null",
            type=["object", "string", "null"],
            minLength=1,
        ),
    ] = None
    """CPM-Live's configuration keys, or the path of a JSON file that holds them, whose content takes its place. None if
    the folder at `path` has its own."""

    path: UserPath | None = None
    """Pretrained weights: a Hugging Face folder, or a CPM-Live `.pt` file that `config` describes. None: random
    weights."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer that turns the corpus into ids."""

    type: TokenizerType
    """`sentencepiece`: a `.model` file, or one that the run trains; `hf`: a folder that Hugging Face's AutoTokenizer
    reads; `jieba`: CPM-Ant's `vocab.txt`."""

    path: UserPath | None = None
    """The tokenizer's file or folder. None (`sentencepiece` only): the run trains one on the corpus."""

    vocab_size: Size
    """Number of ids; at most the model's vocabulary."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How one stage trains the weights. A stage's own overrides have the same keys."""

    steps: Size
    """Optimizer steps, including those that are not applied."""

    train_batch_size: Size
    """Rows per step, over all ranks and accumulation steps: micro_batch_size × accumulation × ranks."""

    micro_batch_size: Size
    """Most rows that one rank holds in memory at a time. Its share of a step may be smaller."""

    learning_rate: Annotated[float, Limits(minimum=0, maximum=100)]
    """Peak learning rate of the weights."""

    warmup: Fraction = 0.05
    """Fraction of the steps in which the learning rate rises linearly to its peak."""

    schedule: Schedule = "cosine"
    """Shape of the decay after the warmup."""

    min_learning_rate: Fraction = 0.1
    """Learning rate at the last step, as a fraction of the peak. Unused by `constant`."""

    weight_decay: Fraction = 0.0
    """Decoupled weight decay (AdamW)."""

    clip: Scale = 1.0
    """Largest global gradient norm. 0: no clipping."""

    precision: Precision = "auto"
    """Arithmetic of the forward and backward passes. `auto`: bf16 where the device has it, else fp32."""

    train_weights: bool = True
    """False: only the gates learn; the weights stay fixed."""

    activation_checkpointing: bool = False
    """True: activations are computed again in the backward pass, instead of being kept in memory."""

    log_every: Size = 10
    """Steps between two log lines."""

    save_every: Count = 0
    """Steps between two checkpoints. 0: only at the end of the stage."""

    keep_checkpoints: Size = 2
    """Number of newest checkpoints that stay on disk."""

    eval_rows: Count = 256
    """Held-out rows per evaluation. 0: no evaluation."""

    max_bad_steps: Size = 3
    """Failed steps in a row that end the run. A step fails if its loss or gradient is not finite, or if it is skipped
    as a spike."""

    spike: SpikeAction = "off"
    """What happens at a step far above the recent ones: nothing, a note in the log, no update, or the end of the
    run."""

    spike_measure: SpikeMeasure = "gradient_norm"
    """What is compared: the gradient's global norm, or the loss."""

    spike_factor: Annotated[float, Limits(exclusiveMinimum=1, maximum=10**6)] = 10.0
    """A spike is more than this many times the median of the last `spike_window` updates."""

    spike_window: Annotated[int, Limits(minimum=1, maximum=10**4)] = 64
    """Updates that the median is taken of. Until there are as many, no step is a spike."""

    threads: Annotated[int, Limits(minimum=1, maximum=4096)] | None = None
    """CPU threads per rank. None: the machine's cores divided by its ranks."""

    rank_timeout: Scale = 300.0
    """Seconds after which a silent rank or an unfinished step ends the run; ten times as many for a first step, a save
    or an evaluation. 0: never. Read from the `training` section alone."""

    def rows_at_once(self, world_size: int) -> int:
        """Rows of a micro-batch: `micro_batch_size`, or a rank's whole share of the batch where that is smaller."""
        return min(self.micro_batch_size, max(1, self.train_batch_size // world_size))


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where a run reports to, beside its log file."""

    tensorboard: bool = True
    """True: scalars for TensorBoard are written inside `output_dir`."""


WeightSuffix = Annotated[
    str,
    Limits(
        title="the end of a weight's name, such as self_attention.project_q.weight",
        pattern="^[A-Za-z0-9_.]+$",
    ),
]


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Whether to prune, what, and at which grain."""

    is_pruning: bool
    """False: plain pretraining."""

    pruning_mask_path: UserPath | None = None
    """Mask file (`.safetensors`) of a pattern: read and held if it exists, else made and written. None for other
    methods."""

    pruned_module: Annotated[tuple[WeightSuffix, ...], Limits(minItems=1, maxItems=10**4)]
    """Suffixes of the names of the weights that may be pruned. No other weight is."""

    mask_method: MaskMethod
    """`coarse-grained`: whole attention and FFN blocks; `fine-grained`: heads or FFN dims inside the kept blocks;
    `joint`: heads, dims and, where wanted, blocks at once; `pattern`: single weights, see the section `pattern`;
    `m4n2_1d`, `m4n2_2d`: two of four weights along the inputs, or both ways."""

    l0_pruning: UserPath = "l0_pruning.json"
    """The scheme's file, relative to the folder of this one."""


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """One stage of the recipe."""

    name: StageName
    """Which stage."""

    training: Annotated[dict[str, Any], KeysOf(TrainingConfig, complete=False)] = field(default_factory=dict)
    """Keys of `training` that this stage changes."""


@dataclass(frozen=True, kw_only=True)
class ConfigSource:
    """The two files that a configuration was read from."""

    bmcook: str
    """What to do."""

    l0_pruning: str | None
    """The scheme; None if plain pretraining was asked for and there is no such file."""


DEEPSPEED = {
    "title": "a DeepSpeed configuration or the path of one",
    "type": ["object", "string"],
    "minLength": 1,
    "format": "path",
    "properties": {key: {"type": "object"} for key in ("zero_optimization", "bf16", "fp16")}
    | {key: {"type": "object", "properties": {"params": {"type": "object"}}} for key in ("optimizer", "scheduler")},
}
"""What cook itself reads of the DeepSpeed configuration; `cook.training.deepspeed_checks` knows the rest."""

DERIVED = ("stage", "source")
"""Fields of RunConfig that stand in no file."""

SCHEME_SECTIONS = {"coarse-grained": "coarse", "fine-grained": "fine", "joint": "joint", "gates": "gates"}
"""Sections of the scheme, and the fields of RunConfig that hold them; the other fields are those of `bmcook.json`."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is told, checked as a whole. Made by `cook.config.load.load_config`."""

    output_dir: UserPath
    """Folder for all that the run writes, except the mask files, which have paths of their own."""

    seed: Annotated[int, Limits(minimum=0, maximum=2**32 - 1)] = 0
    """Seed of the weights, the data order and the gates' noise."""

    model: ModelConfig
    """The model to train or prune: a description, pretrained weights, or both."""

    tokenizer: TokenizerConfig
    """The tokenizer that turns the corpus into ids."""

    data: DataConfig
    """The corpus, and how rows are cut from it."""

    training: TrainingConfig
    """How every stage trains the weights, unless it says otherwise."""

    deepspeed: Annotated[dict[str, Any], DEEPSPEED] = field(default_factory=dict)
    """A plain DeepSpeed configuration, or the path of one. "auto" values are filled in from `training`."""

    distillation: DistillationConfig | None = None
    """A dense teacher whose outputs the pruned model imitates. None: no teacher."""

    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Where a run reports to, beside its log file."""

    pruning: PruningConfig
    """Whether to prune, what, and at which grain."""

    pattern: PatternConfig | None = None
    """The pattern in which single weights are pruned. None: no pattern."""

    coarse: CoarseConfig | None = None
    """Whole attention and FFN blocks."""

    fine: FineConfig | None = None
    """Heads and FFN dims inside the kept blocks."""

    joint: JointConfig | None = None
    """Heads, FFN dims and, where wanted, whole blocks learned in one stage. Sizes, targets and mask files are those of
    `fine-grained`."""

    gates: GatesConfig = field(default_factory=GatesConfig)
    """How the gates learn."""

    stages: Annotated[tuple[StageEntry, ...], Limits(maxItems=len(STAGE_NAMES))] = ()
    """The recipe, in order. Empty: only the stage that the two files describe."""

    stage: StageName
    """The stage that this configuration describes: decoded once from `is_pruning`, `mask_method`, `train_mask` and
    `prune_mode`, which nothing reads after the check."""

    source: ConfigSource
    """Where all this was read."""


def training_for(config: RunConfig, stage_name: str) -> TrainingConfig:
    """The training section with the overrides of one stage applied; unchanged for a stage that the recipe lacks."""
    for entry in config.stages:
        if entry.name == stage_name:
            return dataclasses.replace(config.training, **entry.training)
    return config.training


def stage_of(
    pruning: PruningConfig, coarse: CoarseConfig | None, fine: FineConfig | None, joint: JointConfig | None
) -> StageName | None:
    """The stage that these sections describe; None where its own is missing."""
    if not pruning.is_pruning:
        return "pretrain"
    if pruning.mask_method in PATTERN_METHODS:
        return "pattern"
    if pruning.mask_method == "coarse-grained":
        return None if coarse is None else "layer_mask" if coarse.train_mask else "layer_finetune"
    if pruning.mask_method == "joint":
        return None if joint is None else "joint_mask" if joint.train_mask else "joint_finetune"
    if fine is None:
        return None
    if fine.prune_mode == "att":
        return "att_mask" if fine.train_mask else "att_finetune"
    return "ffn_mask" if fine.train_mask else "ffn_finetune"


def for_stage(config: RunConfig, stage_name: StageName) -> RunConfig:
    """The configuration of one stage: `stage` is its name, `training` holds its overrides.

    Its `distillation` is None where the stage has no teacher.
    """
    pruning = config.pruning
    if stage_name == "pattern" and pruning.mask_method not in PATTERN_METHODS:
        pruning = dataclasses.replace(pruning, mask_method="pattern")
    teacher = config.distillation
    if teacher is not None and (stage_name == "pretrain" or stage_name not in (teacher.stages or STAGE_NAMES)):
        teacher = None
    training = training_for(config, stage_name)
    return dataclasses.replace(config, stage=stage_name, pruning=pruning, training=training, distillation=teacher)
