"""The settings of a run: one frozen dataclass per section of `bmcook.json` and of the scheme `l0_pruning.json`.

A component receives its own section, never the whole `RunConfig`. All defaults are defined here; the JSON schemas are
generated from them. Paths are strings as the user wrote them, relative to the current working directory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from cook.config.corpus import DataConfig
from cook.config.declare import Count, Fraction, KeysOf, Limits, Scale, Size, UserPath
from cook.config.distillation import DistillationConfig
from cook.config.moefy import MoefyConfig
from cook.config.quantization import QuantizationConfig
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
MicroBatchSize = Annotated[
    int | Literal["auto"],
    Limits(
        title='an integer from 1 to 1000000000, or "auto"',
        type=["integer", "string"],
        minimum=1,
        maximum=10**9,
        pattern="^auto$",
    ),
]
MaskModules = Annotated[list[Annotated[list[bool], Limits(minItems=2, maxItems=2)]] | None, Limits(maxItems=10**5)]


@dataclass(frozen=True, kw_only=True)
class CpmLiveKeys:
    """CPM-Live's model configuration, as published by its authors."""

    vocab_size: Size
    """Rows of the token embedding."""
    dim_model: Size
    """Hidden size: width of the residual stream."""
    num_layers: Size
    """Number of layers. Each has one attention block and one FFN block."""
    num_heads: Size
    """Attention heads per block."""
    dim_head: Size
    """Width of a head."""
    dim_ff: Size
    """FFN dimension: inner width of an FFN block."""
    dropout_p: Annotated[float, Limits(minimum=0, exclusiveMaximum=1)] = 0.0
    """Dropout probability."""
    position_bias_num_buckets: Annotated[Size, Limits(multipleOf=4)]
    """Buckets of the relative position bias, half of them per direction. A multiple of 4."""
    position_bias_max_distance: Size
    """Distance from which all positions share the last bucket."""
    eps: Annotated[float, Limits(exclusiveMinimum=0, maximum=1)]
    """Number added to the variance in the layer norms."""
    half: bool = True
    """CPM-Live's switch for half precision weights. Unused: see `training.precision`."""
    prompt_types: Annotated[Size, Limits(minimum=3)]
    """Number of prompt types, one per task. The causal language model uses number 2."""
    prompt_length: Size
    """Prompt embeddings in front of every row."""
    segment_types: Annotated[Size, Limits(minimum=3)]
    """Number of segment embeddings. The text of the causal language model is segment 2."""
    mask_modules: MaskModules = None
    """A pair [attention, FFN] per layer, true if the block is physically removed. None: no block is removed."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to train or prune: a description, pretrained weights, or both."""

    type: ModelType
    """`cpm_ant`, or `hf`: the Hugging Face folder at `path`, of any supported model family."""
    config: Annotated[
        dict[str, Any] | None,
        KeysOf(CpmLiveKeys),
        Limits(
            title="CPM-Live's keys, the path of a JSON file, or null", type=["object", "string", "null"], minLength=1
        ),
    ] = None
    """CPM-Live's configuration keys, or the path of a JSON file that contains them. None if the folder at `path` has a
    config."""
    path: UserPath | None = None
    """Pretrained weights: a Hugging Face folder, or a CPM-Live `.pt` file that `config` describes. None: random
    weights."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer that converts the corpus to ids."""

    type: TokenizerType
    """`sentencepiece`: a `.model` file, or one that the run trains; `hf`: a folder for Hugging Face's AutoTokenizer;
    `jieba`: CPM-Ant's `vocab.txt`."""
    path: UserPath | None = None
    """The tokenizer's file or folder. None (`sentencepiece` only): the run trains one on the corpus."""
    vocab_size: Size
    """Number of ids, at most the model's vocabulary size."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a stage trains the weights. The overrides of a stage have the same keys."""

    steps: Size
    """Optimizer steps, including those that are not applied."""
    train_batch_size: Size
    """Rows per step, over all ranks and accumulation steps: micro_batch_size × accumulation × ranks."""
    micro_batch_size: MicroBatchSize
    """Maximal number of rows that a rank processes at once. Its share of a step may be smaller. `auto`: the largest
    number that fits in memory, which a stage finds by halving its share before the first step."""
    learning_rate: Annotated[float, Limits(minimum=0, maximum=100)]
    """Peak learning rate of the weights."""
    warmup: Fraction = 0.05
    """Fraction of the steps in which the learning rate rises linearly to its peak."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate's decay after the warmup."""
    min_learning_rate: Fraction = 0.1
    """Learning rate at the last step, as a fraction of the peak. Unused by `constant`."""
    weight_decay: Fraction = 0.0
    """Decoupled weight decay (AdamW)."""
    clip: Scale = 1.0
    """Maximal global gradient norm. 0: no clipping."""
    precision: Precision = "auto"
    """Precision of the forward and backward passes. `auto`: bf16 if the device supports it, else fp32."""
    train_weights: bool = True
    """False: only the gates are trained, and the weights stay fixed."""
    carry_optimizer: bool = True
    """True: the optimizer starts with the moments and the step count that the stage before ended with, as long as both
    train their weights and that stage's last checkpoint exists. False: it starts from zero."""
    remove_masked: bool = True
    """Stages with fixed masks train the smaller model, without the removed units, which is equal up to rounding. False:
    they train the whole model with the masks applied."""
    activation_checkpointing: bool = False
    """True: activations are recomputed in the backward pass instead of being kept in memory."""
    log_every: Size = 10
    """Steps between two log lines."""
    log_gates: bool = True
    """True: stages that learn masks record how open each gate is, at most once per second, in `gates.bin`."""
    save_every: Count = 0
    """Steps between two checkpoints. 0: only at the end of the stage."""
    keep_checkpoints: Size = 2
    """Number of most recent checkpoints to keep on disk."""
    eval_rows: Count = 256
    """Held-out rows per evaluation. 0: no evaluation."""
    max_bad_steps: Size = 3
    """Number of consecutive failed steps that ends the run. A step fails if its loss or gradient is not finite, or if
    it is skipped as a spike."""
    spike: SpikeAction = "off"
    """What happens in a step whose `spike_measure` is far above the recent ones. `off`: nothing; `log`: it is logged;
    `skip`: the update is skipped; `stop`: the run ends."""
    spike_measure: SpikeMeasure = "gradient_norm"
    """The value that is compared: the global gradient norm or the loss."""
    spike_factor: Annotated[float, Limits(exclusiveMinimum=1, maximum=10**6)] = 10.0
    """A spike is more than this many times the median of the last `spike_window` updates."""
    spike_window: Annotated[int, Limits(minimum=1, maximum=10**4)] = 64
    """Number of updates over which the median is taken. Before that many updates, no step is a spike."""
    threads: Annotated[int, Limits(minimum=1, maximum=4096)] | None = None
    """CPU threads per rank. None: the machine's cores divided by its ranks."""
    rank_timeout: Scale = 300.0
    """Seconds after which a silent rank or an unfinished step ends the run; ten times as many for a first step, a save
    or an evaluation. 0: never. Only the value in the `training` section is used."""

    def rows_at_once(self, world_size: int) -> int:
        """Returns the rows per micro-batch: `micro_batch_size`, or a rank's share of the batch if that is smaller."""
        share = max(1, self.train_batch_size // world_size)
        return share if self.micro_batch_size == "auto" else min(self.micro_batch_size, share)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Outputs of a run in addition to its log file."""

    tensorboard: bool = True
    """True: scalars for TensorBoard are written to `output_dir`."""


WeightSuffix = Annotated[
    str, Limits(title="the end of a weight's name, such as self_attention.project_q.weight", pattern="^[A-Za-z0-9_.]+$")
]


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Whether to prune, and what."""

    is_pruning: bool
    """False: plain pretraining."""
    pruning_mask_path: UserPath | None = None
    """Mask file (`.safetensors`) of a pattern. It is read and applied if it exists, else made and written. None for
    other methods."""
    pruned_module: Annotated[tuple[WeightSuffix, ...], Limits(minItems=1, maxItems=10**4)]
    """Suffixes of the names of the weights that may be pruned. No other weights are pruned."""
    mask_method: MaskMethod
    """`coarse-grained`: whole attention and FFN blocks; `fine-grained`: heads or FFN dims inside the kept blocks;
    `joint`: heads, dims and optionally blocks and hidden dims at once; `pattern`: single weights, see the section
    `pattern`; `m4n2_1d`, `m4n2_2d`: two of every four weights, along the inputs or in both directions."""
    l0_pruning: UserPath = "l0_pruning.json"
    """The file of the scheme, relative to the folder of this file."""


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """One stage of the recipe."""

    name: StageName
    """The name of the stage."""
    training: Annotated[dict[str, Any], KeysOf(TrainingConfig, complete=False)] = field(default_factory=dict)
    """Keys of `training` that this stage changes."""


@dataclass(frozen=True, kw_only=True)
class ConfigSource:
    """The files that a configuration was read from."""

    bmcook: str
    """Path of `bmcook.json`."""
    l0_pruning: str | None
    """Path of the scheme. None if no scheme is needed and the file does not exist."""


DEEPSPEED = {
    "title": "a DeepSpeed configuration or the path of one",
    "type": ["object", "string"],
    "minLength": 1,
    "format": "path",
    "properties": {key: {"type": "object"} for key in ("zero_optimization", "bf16", "fp16")}
    | {key: {"type": "object", "properties": {"params": {"type": "object"}}} for key in ("optimizer", "scheduler")},
}
"""The parts of the DeepSpeed configuration that cook reads. `cook.training.deepspeed_checks` checks the rest."""

DERIVED = ("stage", "source")
"""Fields of RunConfig that are not in a file."""

SCHEME_SECTIONS = {"coarse-grained": "coarse", "fine-grained": "fine", "joint": "joint", "gates": "gates"}
"""Sections of the scheme, and the fields of RunConfig that hold them; the other fields are those of `bmcook.json`."""
FIELD_OF = SCHEME_SECTIONS | {"MoEfication": "moefy"}
"""Sections of both files whose fields of RunConfig have other names."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The complete, checked configuration of a run. `cook.config.load.load_config` creates it."""

    output_dir: UserPath
    """Folder for all outputs of the run, except the mask files, which have their own paths."""
    seed: Annotated[int, Limits(minimum=0, maximum=2**32 - 1)] = 0
    """Seed of the initial weights, the data order and the noise of the gates."""
    model: ModelConfig
    """The model to train or prune: a description, pretrained weights, or both."""
    tokenizer: TokenizerConfig
    """The tokenizer that converts the corpus to ids."""
    data: DataConfig
    """The corpus, and how it is cut into rows."""
    training: TrainingConfig
    """How the stages train the weights. A stage can override these settings."""
    deepspeed: Annotated[dict[str, Any], DEEPSPEED] = field(default_factory=dict)
    """A DeepSpeed configuration, or the path of one. "auto" values are filled in from `training`."""
    distillation: DistillationConfig | None = None
    """A dense teacher whose outputs the pruned model imitates. None: no teacher."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Outputs of a run in addition to its log file."""
    pruning: PruningConfig
    """Whether to prune, and what."""
    pattern: PatternConfig | None = None
    """The pattern in which single weights are pruned. None: no pattern."""
    quantization: QuantizationConfig | None = None
    """Weights in few bits: the stage `quantize`. None: no quantization."""
    moefy: MoefyConfig | None = None
    """FFN blocks as mixtures of experts, for the stage `moefy`. None: no such stage."""
    coarse: CoarseConfig | None = None
    """Whole attention and FFN blocks."""
    fine: FineConfig | None = None
    """Heads and FFN dims inside the kept blocks."""
    joint: JointConfig | None = None
    """Heads, FFN dims and optionally whole blocks, learned in one stage. Sizes, targets and mask files are those of
    `fine-grained`."""
    gates: GatesConfig = field(default_factory=GatesConfig)
    """How the gates are trained."""
    stages: Annotated[tuple[StageEntry, ...], Limits(maxItems=len(STAGE_NAMES))] = ()
    """The stages of the recipe, in order. Empty: only the stage that the two files describe."""
    stage: StageName
    """The stage that this configuration describes. It is derived once from `is_pruning`, `mask_method`, `train_mask`
    and `prune_mode`. After the check, only `two_of_four` reads `mask_method` again."""
    source: ConfigSource
    """The files that the configuration was read from."""


def training_for(config: RunConfig, stage_name: str) -> TrainingConfig:
    """Returns the training settings of a stage: `training` with the stage's overrides, if the recipe contains it."""
    training = config.training
    if stage_name == "quantize" and config.quantization and config.quantization.steps:
        training = dataclasses.replace(training, steps=config.quantization.steps)
    for entry in config.stages:
        if entry.name == stage_name:
            training = dataclasses.replace(training, **entry.training)
    if stage_name == "moefy" and config.moefy and config.moefy.steps is not None:
        if not config.moefy.steps:  # a stage has at least one step
            return dataclasses.replace(training, steps=1, train_weights=False)
        return dataclasses.replace(training, steps=config.moefy.steps)
    return training


def decoded(mask_method: Any) -> Any:
    """Decodes `mask_method`, also an unchecked one: "pattern" for every method that prunes single weights."""
    return "pattern" if mask_method in PATTERN_METHODS else mask_method


def method_of(pruning: PruningConfig) -> str | None:
    """Returns the decoded method that the files describe. None if they describe no pruning."""
    return decoded(pruning.mask_method) if pruning.is_pruning else None


def two_of_four(pruning: PruningConfig) -> str | None:
    """Returns the 2:4 pattern that `mask_method` names itself. None if the section `pattern` describes the pattern."""
    return pruning.mask_method if pruning.mask_method in ("m4n2_1d", "m4n2_2d") else None


def stage_of(
    pruning: PruningConfig,
    coarse: CoarseConfig | None,
    fine: FineConfig | None,
    joint: JointConfig | None,
    quantization: QuantizationConfig | None = None,
    moefy: MoefyConfig | None = None,
) -> StageName | None:
    """Returns the stage that these sections describe, or None if the section of that stage is missing."""
    method = method_of(pruning)
    if method is None and moefy is not None and moefy.is_moefy:
        return "moefy"
    if method is None and quantization is not None and quantization.is_quant:
        return "quantize"
    if method is None or method == "pattern":
        return "pattern" if method else "pretrain"
    if method == "coarse-grained":
        return None if coarse is None else "layer_mask" if coarse.train_mask else "layer_finetune"
    if method == "joint":
        return None if joint is None else "joint_mask" if joint.train_mask else "joint_finetune"
    return None if fine is None else cast(StageName, f"{fine.prune_mode}_{'mask' if fine.train_mask else 'finetune'}")


def for_stage(config: RunConfig, stage_name: StageName) -> RunConfig:
    """Returns the configuration of one stage: `stage` is its name, and `training` includes its overrides.

    `distillation` is None if the stage has no teacher.
    """
    teacher = config.distillation
    if teacher is not None and (stage_name == "pretrain" or stage_name not in (teacher.stages or STAGE_NAMES)):
        teacher = None
    training = training_for(config, stage_name)
    return dataclasses.replace(config, stage=stage_name, training=training, distillation=teacher)
