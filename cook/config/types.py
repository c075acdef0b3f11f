"""What a run is told to do, as frozen dataclasses: one a section of `bmcook.json` and of the scheme `l0_pruning.json`.

A component receives its own section, never the whole `RunConfig`. The defaults here are the only ones: the JSON schemas
repeat them for the reader, and a test holds the two together. Paths are strings as the user wrote them; they are
relative to the current working directory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from cook.config.corpus import DataConfig, UserPath
from cook.config.distillation import DistillationConfig
from cook.config.scheme import (
    PATTERN_METHODS,
    CoarseConfig,
    FineConfig,
    GatesConfig,
    JointConfig,
    MaskMethod,
    PatternConfig,
    PruneMode,
)

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

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "linear", "constant"]
SpikeAction = Literal["off", "log", "skip", "stop"]
SpikeMeasure = Literal["gradient_norm", "loss"]
TokenizerType = Literal["sentencepiece", "hf", "jieba"]
ModelType = Literal["cpm_ant", "hf"]

STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to train or prune: a description, pretrained weights, or both. At least one of the two is given."""

    type: ModelType
    """`cpm_ant`, or `hf`: the Hugging Face folder at `path`, of any family that has an adapter."""

    config: dict[str, Any] | None = None
    """CPM-Live's configuration keys. A path to a JSON file in `bmcook.json` has been replaced by the file's content.
    None for `hf`, whose folder has a config.json."""

    path: UserPath | None = None
    """Pretrained weights: a Hugging Face folder, or a CPM-Live `.pt` file that `config` describes. None: random."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer that turns the corpus into ids."""

    type: TokenizerType
    """`sentencepiece`: a `.model` file; `hf`: a folder that Hugging Face's AutoTokenizer reads; `jieba`: CPM-Ant's own,
    a `vocab.txt`."""

    path: UserPath | None = None
    """The tokenizer's file or folder. None (sentencepiece only): the run trains one on the corpus."""

    vocab_size: int
    """Number of ids; at most the model's vocabulary."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How one stage trains the weights. A stage's own overrides have the same keys."""

    steps: int
    """Optimizer steps, those included that are not applied."""

    train_batch_size: int
    """Rows a step, over all ranks and accumulation steps: micro_batch_size × accumulation × ranks."""

    micro_batch_size: int
    """Rows that one rank holds in memory at a time, at most: a rank's share of a step may be smaller."""

    learning_rate: float
    """Peak learning rate of the weights."""

    warmup: float = 0.05
    """Fraction of the steps in which the learning rate rises linearly to its peak."""

    schedule: Schedule = "cosine"
    """Shape of the decay after the warmup."""

    min_learning_rate: float = 0.1
    """Learning rate at the last step, as a fraction of the peak; unused by `constant`."""

    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""

    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    precision: Precision = "auto"
    """Arithmetic of the forward and backward passes; `auto`: bf16 where the device has it, else fp32."""

    train_weights: bool = True
    """False: only the gates learn, the weights stay as they are."""

    activation_checkpointing: bool = False
    """True: blocks are computed again in the backward pass instead of being kept in memory."""

    log_every: int = 10
    """Steps between two log lines."""

    save_every: int = 0
    """Steps between two checkpoints; 0: only at the end of the stage."""

    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""

    eval_rows: int = 256
    """Held-out rows that an evaluation reads; 0: no evaluation."""

    max_bad_steps: int = 3
    """Steps in a row that end the run when they fail: loss or gradient not finite, or a spike that is skipped."""

    spike: SpikeAction = "off"
    """What happens to a step far above the recent ones: nothing, a note in the log, no update, or the run's end."""

    spike_measure: SpikeMeasure = "gradient_norm"
    """What is compared: the gradient's global norm, or the loss."""

    spike_factor: float = 10.0
    """How many times the median of the last `spike_window` updates is a spike."""

    spike_window: int = 64
    """Updates that the median is taken of; until there are as many nothing is a spike."""

    threads: int | None = None
    """CPU threads a rank. None: the machine's cores shared out among its ranks."""

    rank_timeout: float = 300.0
    """Seconds after which a silent rank or an unfinished step ends the run; ten times as many for a first step, a save
    or an evaluation; 0: never. Read from the `training` section alone."""

    def rows_at_once(self, world_size: int) -> int:
        """Rows of a micro-batch: `micro_batch_size`, or a rank's whole share of the batch where that is smaller."""
        return min(self.micro_batch_size, max(1, self.train_batch_size // world_size))


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where a run reports to, beside its log file."""

    tensorboard: bool = True
    """True: scalars for TensorBoard are written inside the output folder."""


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """The `pruning` section: whether to prune, what, and at which grain."""

    is_pruning: bool
    """False: plain pretraining."""

    pruning_mask_path: UserPath | None = None
    """Mask file (`.safetensors`) of a pattern: read and held if it is there, else made; None for other methods."""

    pruned_module: tuple[str, ...]
    """Suffixes of the weight names that may be pruned; nothing else is."""

    mask_method: MaskMethod
    """Grain of the single stage that the two files describe."""


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """One stage of the recipe."""

    name: StageName
    """Which stage."""

    training: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingConfig that this stage changes, already of the right type."""


@dataclass(frozen=True, kw_only=True)
class ConfigSource:
    """The two files that a configuration was read from."""

    bmcook: str
    """What to do."""

    l0_pruning: str | None
    """The scheme; None if plain pretraining was asked for and there is no such file."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is told, checked as a whole. Made by `cook.config.load.load_config`."""

    output_dir: UserPath
    """Folder for all that the run writes, the mask files apart, which have paths of their own."""

    seed: int = 0
    """Seed of the weights, the data order and the gates' noise."""

    model: ModelConfig
    """The model."""

    tokenizer: TokenizerConfig
    """The tokenizer."""

    data: DataConfig
    """The corpus."""

    training: TrainingConfig
    """The training of every stage that does not say otherwise; ask `training_for`."""

    deepspeed: dict[str, Any] = field(default_factory=dict)
    """A plain DeepSpeed configuration, its "auto" values not yet filled in."""

    distillation: DistillationConfig | None = None
    """The teacher, or None."""

    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Reporting."""

    pruning: PruningConfig
    """Whether to prune, what, and at which grain."""

    pattern: PatternConfig | None = None
    """The pattern of single weights, where given."""

    coarse: CoarseConfig | None = None
    """The scheme for whole blocks, where given."""

    fine: FineConfig | None = None
    """The scheme for heads and dims, where given."""

    joint: JointConfig | None = None
    """The scheme for learning both at once, where given."""

    gates: GatesConfig = field(default_factory=GatesConfig)
    """How gates learn."""

    stages: tuple[StageEntry, ...] = ()
    """The recipe, in order; empty if the files describe a single stage only."""

    source: ConfigSource
    """Where all this was read."""


def training_for(config: RunConfig, stage_name: str) -> TrainingConfig:
    """The training section with the overrides of one stage applied; unchanged for a stage that the recipe lacks."""
    for entry in config.stages:
        if entry.name == stage_name:
            return dataclasses.replace(config.training, **entry.training)
    return config.training


def described_stage(config: RunConfig) -> StageName:
    """The one stage that `is_pruning`, `mask_method`, `train_mask` and `prune_mode` describe together."""
    name = stage_of(config.pruning, config.coarse, config.fine, config.joint)
    assert name is not None, "the loader lets no stage pass without its section"
    return name


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
    """The configuration whose switches describe `stage_name` and whose `training` holds that stage's overrides.

    Its `distillation` is None where the stage has no teacher. `random_baseline` finetunes a masked model, so its
    switches are left as they stand.
    """
    pruning, coarse, fine, joint = config.pruning, config.coarse, config.fine, config.joint
    unit, _, kind = stage_name.partition("_")
    if stage_name == "pretrain":
        pruning = dataclasses.replace(pruning, is_pruning=False)
    elif unit == "layer":
        assert coarse is not None, "the loader lets no layer stage pass without the coarse-grained section"
        pruning = dataclasses.replace(pruning, is_pruning=True, mask_method="coarse-grained")
        coarse = dataclasses.replace(coarse, train_mask=kind == "mask")
    elif unit == "pattern":
        method = pruning.mask_method if pruning.mask_method in PATTERN_METHODS else "pattern"
        pruning = dataclasses.replace(pruning, is_pruning=True, mask_method=method)
    elif unit == "joint":
        assert joint is not None, "the loader lets no joint stage pass without its section"
        pruning = dataclasses.replace(pruning, is_pruning=True, mask_method="joint")
        joint = dataclasses.replace(joint, train_mask=kind == "mask")
    elif unit in ("att", "ffn"):
        assert fine is not None, "the loader lets no att or ffn stage pass without the fine-grained section"
        pruning = dataclasses.replace(pruning, is_pruning=True, mask_method="fine-grained")
        mode: PruneMode = "att" if unit == "att" else "ffn"
        fine = dataclasses.replace(fine, train_mask=kind == "mask", prune_mode=mode)
    teacher = config.distillation
    if teacher is not None and (stage_name == "pretrain" or stage_name not in (teacher.stages or STAGE_NAMES)):
        teacher = None
    training = training_for(config, stage_name)
    return dataclasses.replace(
        config, pruning=pruning, coarse=coarse, fine=fine, joint=joint, training=training, distillation=teacher
    )
