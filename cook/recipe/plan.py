"""The recipe as data: what each stage learns and keeps fixed, and which weights and masks it reads and writes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cook.base.errors import UserError
from cook.base.files import read_json
from cook.config.distillation import OWN_TEACHER
from cook.config.kinds import FINE, FINE_STAGES, NAMES, OPTIONAL, Kind
from cook.config.quantization import QuantizationConfig
from cook.config.types import RunConfig, StageName, for_stage, training_for, two_of_four
from cook.recipe.sources import DONE, model_files

LEARNS: dict[str, tuple[Kind, ...]] = {f"{names.stage}_mask": (kind,) for kind, names in NAMES.items()}
LEARNS["joint_mask"] = tuple(NAMES)
"""The masks that a stage learns and writes; a joint stage those of `OPTIONAL` kinds only if they have a target."""


@dataclass(frozen=True, kw_only=True)
class MaskPaths:
    """Mask files by kind; None if that kind is not masked."""

    layer: str | None = None
    heads: str | None = None
    dimff: str | None = None
    experts: str | None = None
    head_dims: str | None = None
    hidden: str | None = None

    @property
    def by_option(self) -> dict[str, str | None]:
        """The files by the names of `cook.pruning.mask_file.read_masks`."""
        return {"coarse" if kind == "layer" else kind: path for kind, path in vars(self).items()}

    def of_size(self, size: float) -> MaskPaths:
        """The files of one of several sizes: `heads-0.5.pt` for `heads.pt`."""
        named = {kind: path and f"{Path(path).with_suffix('')}-{size:g}.pt" for kind, path in vars(self).items()}
        return MaskPaths(**named)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run of the recipe."""

    name: StageName
    config: RunConfig
    """The run's configuration with this stage's switches and training overrides."""
    learns: tuple[Kind, ...]
    """The kinds of units whose gates are trained together with the weights."""
    fixed: MaskPaths
    """Masks that are read from files and stay fixed."""
    writes: MaskPaths
    """The mask files that the stage writes, if it learns masks."""
    after: StageName | None
    """The stage whose weights this stage starts from; None for `model.path` or fresh weights."""
    adapted: bool = False
    """Whether an earlier stage of the recipe trains weights with masks applied, which then need these masks."""

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir) / self.name

    @property
    def done(self) -> Path:
        """The file that the stage writes when it has finished."""
        return self.folder / DONE

    @property
    def done_before(self) -> Path | None:
        """The same file of the stage that this stage starts from."""
        return Path(self.config.output_dir) / self.after / DONE if self.after else None

    @property
    def pattern_mask(self) -> str | None:
        """The mask file of single weights that the stage reads or writes; None in other stages."""
        has_pattern = "pattern" in (self.name, self.after if self.name == "quantize" else None)
        return self.config.pruning.pruning_mask_path if has_pattern else None

    @property
    def is_random_baseline(self) -> bool:
        return self.name == "random_baseline"

    @property
    def quantization(self) -> QuantizationConfig | None:
        """How the stage quantizes weights; None in other stages."""
        return self.config.quantization if self.name == "quantize" else None

    @property
    def compensates(self) -> bool:
        """Whether what removed heads or FFN dimensions add on average stays as a bias."""
        return self.config.gates.compensation and not {"heads", "dimff"}.isdisjoint(self.learns)

    @property
    def is_moefy(self) -> bool:
        return self.name == "moefy"

    @property
    def sizes(self) -> tuple[float, ...]:
        """The targets of the stage's nested models, from the largest; empty if the stage makes one model."""
        joint = self.config.joint
        return joint.sizes if joint and self.name.startswith("joint") else ()

    def by_size(self, paths: MaskPaths) -> list[MaskPaths]:
        """These mask files of each size; the same files if the stage makes one model."""
        return [paths.of_size(size) for size in self.sizes] or [paths]

    def mask_files(self) -> list[str]:
        """The mask files of units that the stage reads and writes."""
        both = [*self.by_size(self.fixed), *self.by_size(self.writes)]
        return [path for paths in both for path in vars(paths).values() if path]

    @property
    def _parts(self) -> set[str]:
        """The first words of the stages of this run."""
        return {name.partition("_")[0] for name in (self.name, *(entry.name for entry in self.config.stages))}

    @property
    def one_budget(self) -> bool:
        """Whether all heads and FFN dimensions of the model share one budget in this run."""
        joint = self.config.joint
        return joint is not None and joint.scope == "global" and "joint" in self._parts

    @property
    def uneven(self) -> set[str]:
        """The kinds of units for which the blocks of this run share one budget."""
        units, fine = self._parts, self.config.fine
        kinds = {"heads": "att", "dimff": "ffn", "experts": "experts"}
        if self.one_budget:
            return {"heads", "dimff", *(["experts"] if fine and fine.target_experts is not None else [])}
        return {kind for kind, unit in kinds.items() if fine and fine.scope == "global" and unit in units}

    @property
    def redo(self) -> str:
        return f"--stage {self.name}"

    def source_files(self) -> list[Path]:
        """The start model, the teacher, and the masks that the stage reads."""
        config, before = self.config, self.done_before
        models = [config.model.path] if config.model.path and not (before and before.exists()) else []
        if config.distillation and config.distillation.teacher != OWN_TEACHER:
            models.append(config.distillation.teacher)
        masks = self.inherited_masks()
        if self.name == "pattern" and config.pattern and config.pattern.previous_mask:
            masks.append(config.pattern.previous_mask)
        return [file for path in models for file in model_files(Path(path))] + [Path(path) for path in masks]

    def inherited_masks(self) -> list[str]:
        """The mask files that stay fixed during the stage."""
        units = [path for paths in self.by_size(self.fixed) for path in vars(paths).values() if path]
        return units + [path for path in [self.pattern_mask] if path and self.name != "pattern"]

    def traces(self) -> list[Path]:
        """The pattern mask, if this run makes it; the experts of a stage."""
        if self.is_moefy:
            return [self.folder / "experts.safetensors"]
        mask, output = self.pattern_mask, Path(self.config.output_dir).resolve()
        return [Path(mask)] if mask and self.name == "pattern" and Path(mask).resolve().is_relative_to(output) else []

    def _targets(self) -> list[Any]:
        """The targets that determine the stage's outcome; a random baseline depends on the targets of all stages."""
        coarse, fine, joint = self.config.coarse, self.config.fine, self.config.joint
        heads: Any = fine.target_num_heads if fine else None
        if fine and (fine.head_unit != "auto" or fine.allow_remote_code):
            heads = [heads, fine.head_unit, fine.allow_remote_code]
        dims: Any = fine.target_dimff if fine else None
        at_once: list[Any] = [asdict(joint) | {"train_mask": None}, heads, dims] if joint else []
        for key in ("blocks", "pin"):
            if joint and not getattr(joint, key):
                at_once[0].pop(key)
        if joint and joint.block_times:
            at_once[0] |= {"block_times": read_json(joint.block_times)}
        if fine and fine.scope != "block":
            heads, dims = [heads, fine.scope], [dims, fine.scope]
        blocks: Any = coarse.target_sparsity if coarse else None
        if coarse and coarse.unit != "block":
            blocks = [blocks, coarse.unit]
        if fine and fine.round_to != 1:
            dims = [dims, fine.round_to]
        targets: dict[str, Any] = {"layer": blocks, "heads": heads, "dimff": dims}
        if fine and fine.target_head_dim is not None:
            targets["head_dims"] = ["head_dims", fine.target_head_dim]
        if fine and fine.target_hidden is not None:
            targets["hidden"] = [fine.target_hidden, fine.round_to]
        if fine and fine.target_experts is not None:
            targets["experts"] = ["experts", fine.target_experts, fine.scope]
        at_once += [targets[kind] for kind in OPTIONAL if kind in targets] if joint else []
        if self.is_random_baseline:
            joined = any(entry.name == "joint_mask" for entry in self.config.stages)
            return [*targets.values(), *(at_once if joined else [])]
        if self.name == "joint_mask":
            return at_once
        return [targets[kind] for kind in self.learns]

    def pattern_settings(self) -> dict[str, Any]:
        """The settings that determine the mask of single weights; empty in stages without one."""
        if self.pattern_mask is None:
            return {}
        pattern = asdict(self.config.pattern) if self.config.pattern else {}
        pattern.pop("previous_mask", None)  # its content counts, not its path
        return {"method": two_of_four(self.config.pruning) or "pattern", "pattern": pattern}

    def moefy_settings(self) -> dict[str, Any]:
        """The settings that determine the experts; empty in other stages."""
        if self.name != "moefy":
            return {}
        assert self.config.moefy is not None
        moefy = asdict(self.config.moefy)
        moefy.pop("steps")  # those of `training`
        return {"moefy": moefy}

    def quantization_settings(self) -> dict[str, Any]:
        """The section `quantization`, without what older runs did not have and do not use; empty in other stages."""
        if self.quantization is None:
            return {}
        settings = asdict(self.quantization)
        if not settings["embeddings"]:
            settings.pop("embeddings")
        return {"quantization": settings}

    def fingerprint(self) -> str:
        """Hash of the settings that determine the stage's outcome; output paths and logging do not.

        Fixed masks are not settings: their content is part of the run's identity.
        """
        config = self.config
        training, data = asdict(config.training), asdict(config.data)
        for key in (
            "log_every",
            "log_gates",
            "save_every",
            "keep_checkpoints",
            "threads",
            "micro_batch_size",
            "eval_rows",
            "rank_timeout",
            "max_bad_steps",
            "spike",
            "spike_measure",
            "spike_factor",
            "spike_window",
            "remove_masked",
        ):
            training.pop(key)
        if self.after is None:
            training.pop("carry_optimizer")  # nothing to carry
        for key in ("cache_dir", "workers", "ledger"):
            data.pop(key)
        teacher = asdict(config.distillation) if config.distillation else {}
        for key in ("teacher_device", "stages"):
            teacher.pop(key, None)
        described = {
            "stage": self.name,
            "seed": config.seed,
            "model": asdict(config.model),
            "tokenizer": asdict(config.tokenizer),
            "data": data,
            "training": training,
            "deepspeed": {key: config.deepspeed[key] for key in ("optimizer", "scheduler") if key in config.deepspeed},
            "distillation": teacher or None,
            "pruned_module": config.pruning.pruned_module if self.name != "pretrain" else None,
            "targets": self._targets(),
            **self.pattern_settings(),
            **self.moefy_settings(),
            "gates": self._gates() if self.learns or self.is_random_baseline else None,
            **self.quantization_settings(),
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=list).encode()).hexdigest()

    def _gates(self) -> dict[str, Any]:
        """The settings of gates; without compensation as before there was any."""
        gates = asdict(self.config.gates)
        return gates if gates["compensation"] else {k: v for k, v in gates.items() if k != "compensation"}


def recipe(config: RunConfig) -> list[Stage]:
    """All stages in `config.stages`, in order."""
    return [plan_stage(config, entry.name) for entry in config.stages]


def plan_stage(config: RunConfig, name: StageName) -> Stage:
    """The plan of one stage, in or outside the recipe.

    The order of the recipe determines which masks already exist. Other masks are applied if they exist: the
    layer mask if it is named, the other fine masks if their files exist ("heads first" and "dims first" both
    work).

    Raises:
        UserError: the scheme lacks the stage's section, or the path of a mask that it writes.
    """
    _check_sections(config, name)
    order = [entry.name for entry in config.stages]
    before = order[: order.index(name)] if name in order else []
    return Stage(
        name=name,
        config=for_stage(config, name),
        learns=_learns(config, name),
        fixed=_fixed(config, name, order, before),
        writes=_writes(config, name),
        after=_predecessor(name, before),
        adapted=any(training_for(config, early).train_weights for early in before if early != "pretrain"),
    )


def _check_sections(config: RunConfig, name: str) -> None:
    """The loader has checked the stages that the files name; a stage can also be named on the command line."""
    if name == "quantize" and not (config.quantization and config.quantization.is_quant):
        remedy = 'add "quantization": {"is_quant": true} to bmcook.json'
        raise UserError("quantize needs the section 'quantization'", remedy=remedy)
    if name == "moefy" and not (config.moefy and config.moefy.is_moefy):
        raise UserError('moefy needs the section "MoEfication"', remedy="add it to bmcook.json, with is_moefy true")
    sections = {"coarse-grained": config.coarse, "fine-grained": config.fine, "joint": config.joint}
    needed = {"layer": ("coarse-grained",), "joint": ("joint", "fine-grained")}
    needed |= dict.fromkeys(FINE_STAGES, ("fine-grained",))
    for key in needed.get(name.partition("_")[0], ()):
        if sections[key] is None:
            raise UserError(f"{name} needs the section {key!r}", remedy="add it to l0_pruning.json")


def _learns(config: RunConfig, name: str) -> tuple[Kind, ...]:
    """In a joint stage blocks and `OPTIONAL` kinds have gates only if they have a target."""
    kinds, joint = _masked(config, name), config.joint
    if name == "joint_mask" and (joint is None or not (joint.blocks or joint.target_sparsity is not None)):
        return tuple(kind for kind in kinds if kind != "layer")
    return kinds


def _masked(config: RunConfig, name: str) -> tuple[Kind, ...]:
    kinds = LEARNS.get(name, ())
    if name == "joint_mask":
        gone: set[str] = {
            kind for kind in OPTIONAL if config.fine is None or getattr(config.fine, NAMES[kind].target) is None
        }
        gone |= {*config.joint.pinned} if config.joint else set()
        return tuple(kind for kind in kinds if kind not in gone)
    return kinds


def _writes(config: RunConfig, name: str) -> MaskPaths:
    paths = mask_paths(config)
    for kind in _masked(config, name):
        if getattr(paths, kind) is None:
            key = NAMES[kind].mask
            raise UserError(f"{name} needs {key}, where it writes its mask", remedy=f"set {key} in l0_pruning.json")
    return MaskPaths(**{kind: getattr(paths, kind) for kind in _masked(config, name)})


def mask_paths(config: RunConfig) -> MaskPaths:
    """The mask files that the scheme names, whether they exist or not."""
    coarse, fine = config.coarse, config.fine
    layer = (fine.coarse_mask if fine else None) or (coarse.coarse_mask if coarse else None)
    return MaskPaths(layer=layer, **{kind: getattr(fine, names.mask) if fine else None for kind, names in FINE.items()})


def _fixed(config: RunConfig, name: str, order: list[StageName], before: list[StageName]) -> MaskPaths:
    paths = mask_paths(config)
    if name in ("pretrain", "layer_mask", "joint_mask", "pattern", "random_baseline"):
        return MaskPaths()
    if name == "moefy":  # the masks of the model that the stage before it has made
        last = _predecessor(name, before)
        if last is None:
            return MaskPaths()
        written = {kind: path for kind, path in vars(_writes(config, last)).items() if path}
        return replace(_fixed(config, last, order, before[: before.index(last)]), **written)
    if name == "quantize" and {"pattern", "moefy"} & set(before):  # moefy has removed the masked units
        return MaskPaths()
    if name == "joint_finetune" or (name == "quantize" and {"joint_mask", "joint_finetune"} & set(before)):
        return MaskPaths(**{kind: getattr(paths, kind) for kind in _masked(config, "joint_mask")})
    if name == "layer_finetune":
        return MaskPaths(layer=config.coarse.coarse_mask if config.coarse else None)
    layer = config.fine.coarse_mask if config.fine else None
    if name == "quantize" and not {"layer_mask", "layer_finetune"} & set(before):
        layer = paths.layer if paths.layer and Path(paths.layer).exists() else None
    elif name == "quantize":
        layer = paths.layer
    fixed = {"layer": layer}
    for kind, names in FINE.items():
        path = getattr(paths, kind)
        if name.startswith(names.stage):
            fixed[kind] = path if name.endswith("_finetune") else None
        elif name in order and f"{names.stage}_mask" in order:
            fixed[kind] = path if f"{names.stage}_mask" in before else None
        else:
            fixed[kind] = path if path and Path(path).exists() else None
    return MaskPaths(**fixed)


def _predecessor(name: str, before: list[StageName]) -> StageName | None:
    if name == "random_baseline":
        return "pretrain" if "pretrain" in before else None
    earlier = [stage for stage in before if stage != "random_baseline"]
    return earlier[-1] if earlier else None
