"""Checks of the pruning scheme: the order of the stages, the sizes, and the masks that a stage needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations, pairwise
from os.path import normpath

from cook.base.errors import UserError
from cook.config.check_inputs import mask_paths, refused_folder
from cook.config.distillation import OWN_TEACHER, DistillationConfig
from cook.config.facts import ModelFacts
from cook.config.kinds import FINE_STAGES, NAMES, OPTIONAL
from cook.config.types import (
    CoarseConfig,
    FineConfig,
    GatesConfig,
    JointConfig,
    PatternConfig,
    PruningConfig,
    StageEntry,
    method_of,
    stage_of,
    two_of_four,
)

UNITS = ("layer", *FINE_STAGES, "joint")
METHODS = {"layer": "coarse-grained", "joint": "joint"} | dict.fromkeys(FINE_STAGES, "fine-grained")


def mask_is_structured(pruning: PruningConfig, stages: tuple[StageEntry, ...]) -> Iterator[UserError]:
    """Checks that a mask of single weights is given only for a pattern method."""
    if pruning.pruning_mask_path is not None and not uses_pattern(pruning, stages):
        kind = f"{method} pruning" if (method := method_of(pruning)) else "a run without pruning"
        what = f"pruning.pruning_mask_path: {kind} does not use a mask of single weights"
        remedy = "name the masks of this method in the scheme" if method else "leave it out"
        yield UserError(what, wanted="null", got=pruning.pruning_mask_path, remedy=remedy)


def recipe_in_order(stages: tuple[StageEntry, ...]) -> Iterator[UserError]:
    """Checks the order of the stages: pretrain first, layers before heads and dims, a mask before its finetuning, and
    the random baseline last.
    """
    names = [entry.name for entry in stages]
    order = ", ".join(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield UserError(f"stages: {twice[0]} is listed twice", remedy="keep one of them")
        return
    if "pretrain" in names and names[0] != "pretrain":
        yield UserError("stages: pretrain must come first", got=order)
    if "random_baseline" in names and names[-1] != "random_baseline":
        yield UserError("stages: random_baseline must come last", got=order)
    at = {unit: [i for i, name in enumerate(names) if name.partition("_")[0] == unit] for unit in UNITS}
    inner = [place for unit in FINE_STAGES for place in at[unit]]
    if at["layer"] and inner and max(at["layer"]) > min(inner):
        units = "att, ffn, experts, headdim and hidden stages"
        yield UserError(f"stages: the layer stages must come before the {units}", got=order)
    if at["joint"] and (at["layer"] or inner):
        remedy = "keep one kind: the joint stages learn all masks of the others"
        what = "stages: joint stages cannot be combined with layer, att, ffn, experts, headdim and hidden stages"
        yield UserError(what, got=order, remedy=remedy)
    for unit in UNITS:
        mask, finetune = f"{unit}_mask", f"{unit}_finetune"
        if mask in names and finetune in names and names.index(mask) > names.index(finetune):
            yield UserError(f"stages: {mask} must come before {finetune}", got=order)
    for one, other in combinations(FINE_STAGES, 2):
        if at[one] and at[other] and max(at[one]) > min(at[other]) and max(at[other]) > min(at[one]):
            remedy = f"put both {one} stages before both {other} stages, or the other way round"
            yield UserError(f"stages: the {one} and {other} stages are interleaved", got=order, remedy=remedy)


def sections_given(
    pruning: PruningConfig,
    stages: tuple[StageEntry, ...],
    coarse: CoarseConfig | None,
    fine: FineConfig | None,
    joint: JointConfig | None,
) -> Iterator[UserError]:
    """Checks that the scheme has a section for every requested stage."""
    used, method = _units_in_recipe(stages), method_of(pruning)
    for section, given, units in (
        ("coarse-grained", coarse, ("layer",)),
        ("fine-grained", fine, (*FINE_STAGES, "joint")),
        ("joint", joint, ("joint",)),
    ):
        reasons = [f"stages.{unit}_mask" for unit in units if unit in used]
        reasons += [f"pruning.mask_method {method!r}"] if method in {METHODS[unit] for unit in units} else []
        if given is None and reasons:
            yield UserError(f"{section}: missing from the scheme", wanted=f"this section, for {reasons[0]}")


def masks_given(
    pruning: PruningConfig, stages: tuple[StageEntry, ...], coarse: CoarseConfig | None, fine: FineConfig | None
) -> Iterator[UserError]:
    """Checks that every stage has a path for its mask, and that no two masks share a file."""
    used = _units_in_recipe(stages)
    if fine is not None:
        described = str(stage_of(pruning, coarse, fine, None) or method_of(pruning))
        inner = (used | {described.partition("_")[0]}) & {*FINE_STAGES, "joint"}
        if fine.heads_mask is None and inner - {"hidden", "headdim", "experts"}:
            wanted = "the path of the head mask: att mask training writes it, ffn mask training reads it"
            yield UserError("fine-grained.heads_mask: missing", wanted=wanted)
        if fine.dimff_mask is None and inner & {"ffn", "joint"}:
            wanted = "the path of the FFN mask: ffn mask training writes it"
            yield UserError("fine-grained.dimff_mask: missing", wanted=wanted)
        sizes = {"experts": "the experts per block", "head_dims": "dims per head", "hidden": "the hidden size"}
        for kind in OPTIONAL:
            names = NAMES[kind]
            learns = names.stage in inner or ("joint" in inner and getattr(fine, names.target) is not None)
            wanted_of = {names.target: f"{sizes[kind]} after pruning", names.mask: "the path of the mask"}
            for key, wanted in wanted_of.items():
                if getattr(fine, key) is None and learns:
                    yield UserError(f"fine-grained.{key}: missing, and {names.short} are pruned", wanted=wanted)
        if fine.coarse_mask is None and "joint" in inner:
            wanted = "the path of the layer mask: joint mask training writes it too"
            yield UserError("fine-grained.coarse_mask: missing", wanted=wanted)
    if coarse is not None and fine is not None and "layer" in used and used & {*FINE_STAGES}:
        if fine.coarse_mask is not None and normpath(fine.coarse_mask) != normpath(coarse.coarse_mask):
            what = "fine-grained.coarse_mask: not the mask that the layer stages of the recipe write"
            yield UserError(what, wanted=coarse.coarse_mask, got=fine.coarse_mask)
    seen: dict[str, str] = {}
    for key, path in mask_paths(coarse, fine).items():
        other = seen.setdefault(normpath(path), key)
        if key.partition(".")[2] != other.partition(".")[2]:  # both sections may name the layer mask
            yield UserError(f"{key}: the same file as {other}", wanted="a separate file for each mask", got=path)


def sizes_fit(fine: FineConfig | None, facts: ModelFacts) -> Iterator[UserError]:
    """Checks that the targets do not exceed the sizes, and that the sizes are those of the model."""
    if fine is None:
        return
    for key, number in (("target_dimff", fine.target_dimff), ("target_hidden", fine.target_hidden or 0)):
        if number % fine.round_to and (key, number) != ("target_dimff", fine.dim_ff):
            what = f"fine-grained.{key}: not a multiple of round_to"
            yield UserError(what, wanted=f"a multiple of {fine.round_to}", got=number)
    for target, size in (("target_num_heads", "num_heads"), ("target_dimff", "dim_ff")):
        before, after, real = getattr(fine, size), getattr(fine, target), getattr(facts, size)
        if after > before:
            yield UserError(f"fine-grained.{target}: above {size}", wanted=f"at most {before}", got=after)
        if real is not None and before != real:
            what = f"fine-grained.{size}: differs from the model"
            yield UserError(what, wanted=f"{real}, as in the model", got=before)


def layer_mask_given(
    pruning: PruningConfig, stages: tuple[StageEntry, ...], fine: FineConfig | None, facts: ModelFacts
) -> Iterator[UserError]:
    """Checks that fine-grained stages know which blocks are kept."""
    used = _units_in_recipe(stages)
    fits = fine is None or fine.coarse_mask is not None
    is_fine = used & {*FINE_STAGES} or method_of(pruning) == "fine-grained"
    if is_fine and not fits and ("layer" in used or facts.layers_removed is False):
        yield UserError(
            "fine-grained.coarse_mask: missing, and no layers have been removed from the model yet",
            wanted="the path of a layer mask",
            remedy="name the mask of the layer stage, or use a model whose mask_modules lists the removed blocks",
        )


def joint_budget_is_one(joint: JointConfig | None, fine: FineConfig | None) -> Iterator[UserError]:
    """Checks that the keys of a joint budget match its scope, that there is one budget, and that units are left."""
    if joint is None:
        return
    for name in ("blocks", "pin"):
        if getattr(joint, name) and joint.scope == "block":
            remedy = 'leave it out, or set joint.scope to "global"'
            yield UserError(f"joint.{name}: valid only for scope 'global'", got="scope 'block'", remedy=remedy)
    others = joint.blocks or (fine and (fine.target_hidden or fine.target_head_dim))
    if {*joint.pin} == {"heads", "dims"} and not others:
        yield UserError("joint.pin: leaves nothing to prune", got=", ".join(joint.pin), remedy="pin fewer units")
    other = "block" if joint.scope == "global" else "global"
    for key in {"global": (*BUDGETS, *BUDGETS.values()), "block": ("target_sparsity",)}[other]:
        if key is not None and getattr(joint, key) is not None:
            remedy = f'leave it out, or set joint.scope to "{other}"'
            if key == "target_sparsity":
                remedy = "leave it out: a block without any units left is removed"
            yield UserError(f"joint.{key}: valid only for scope {other!r}", got=f"scope {joint.scope!r}", remedy=remedy)
    given = [key for key in BUDGETS if getattr(joint, key) is not None]
    if len(given) > 1:
        yield UserError(f"joint: {len(given)} budgets", wanted=f"one of {', '.join(BUDGETS)}", got=", ".join(given))
    if joint.scope == "global":
        for key, companion in BUDGETS.items():
            if companion is not None and getattr(joint, companion) is not None and key not in given:
                remedy = "leave it out"
                yield UserError(f"joint.{companion}: unused, because {key} is not set", remedy=remedy)
    if joint.target_latency is not None and joint.block_times is None:
        yield UserError(
            "joint.block_times: missing",
            wanted="the table of block times for target_latency",
            remedy=PROFILE,
        )
    if joint.block_times is not None and not os.path.isfile(joint.block_times):
        yield UserError("joint.block_times: there is no such file", got=joint.block_times, remedy=PROFILE)


def sizes_are_nested(joint: JointConfig | None, stages: tuple[StageEntry, ...]) -> Iterator[UserError]:
    """Checks that several sizes are in descending order, and that no stage needs a single one."""
    sizes = joint.sizes if joint else ()
    key = "target_flops" if joint and isinstance(joint.target_flops, tuple) else "target_params"
    if any(after >= before for before, after in pairwise(sizes)):
        got = ", ".join(f"{size:g}" for size in sizes)
        yield UserError(f"joint.{key}: not in descending order", wanted="each share below the one before it", got=got)
    if len({f"{size:g}" for size in sizes}) < len({*sizes}):
        yield UserError(f"joint.{key}: shares differ by less than 6 digits, by which their mask files are named")
    if sizes and any(entry.name == "random_baseline" for entry in stages):
        yield UserError(
            "stages: random_baseline makes one model, and the scheme has several sizes",
            got=f"joint.{key} with {len(sizes)} shares",
            remedy="remove random_baseline, or give one share",
        )


def means_fit(
    gates: GatesConfig,
    joint: JointConfig | None,
    stages: tuple[StageEntry, ...],
    distillation: DistillationConfig | None,
) -> Iterator[UserError]:
    """Checks that the model has one bias if means of removed units are added to it, and that the teacher has none."""
    if not gates.compensation:
        return
    if joint and joint.sizes:
        yield UserError(
            "gates.compensation: each of several sizes would need biases of its own",
            wanted="one share in the joint section",
            got=", ".join(f"{size:g}" for size in joint.sizes),
        )
    masks = [entry.name for entry in stages if entry.name in ("att_mask", "ffn_mask")]
    if len(masks) > 1 and distillation and distillation.teacher == OWN_TEACHER:
        yield UserError(
            'gates.compensation: with distillation.teacher "self" the teacher of the second mask stage is not the '
            "dense model, since its biases contain the means of the first stage",
            got=", ".join(masks),
            remedy="learn both masks in a joint_mask stage, or set distillation.teacher to the folder of the dense "
            "model",
        )


PROFILE = "measure it with `cook profile MODEL --output FILE` on the machine that will run the model"
BUDGETS = {
    "target_params": None,
    "target_flops": "flops_length",
    "target_latency": "block_times",
    "target_memory": "cache_length",
}
"""The keys of `joint` that set a global budget, each with the key that only it uses."""


def _units_in_recipe(stages: tuple[StageEntry, ...]) -> set[str]:
    return {entry.name.partition("_")[0] for entry in stages} & set(UNITS)


def uses_pattern(pruning: PruningConfig, stages: tuple[StageEntry, ...]) -> bool:
    """Returns whether the recipe contains a pattern stage, or the files describe one."""
    return method_of(pruning) == "pattern" or any(entry.name == "pattern" for entry in stages)


def pattern_given(
    pruning: PruningConfig, stages: tuple[StageEntry, ...], pattern: PatternConfig | None
) -> Iterator[UserError]:
    """Checks that a pattern stage has its section and its mask file."""
    if not uses_pattern(pruning, stages):
        return
    if pattern is None and two_of_four(pruning) is None:
        yield UserError("pattern: missing", wanted="a section with the pattern's type and sparsity")
    path = pruning.pruning_mask_path
    if path is None or not path.endswith(".safetensors"):
        wanted = "a path that ends in .safetensors; the mask is read from it if it exists, else written to it"
        yield UserError("pruning.pruning_mask_path: a pattern needs a mask file", wanted=wanted, got=path)
    else:
        yield from refused_folder("pruning.pruning_mask_path", path, os.path.dirname(path) or ".")
    if pattern is not None and pattern.previous_mask is not None:
        if not os.path.isfile(pattern.previous_mask):
            yield UserError("pattern.previous_mask: there is no such file", got=pattern.previous_mask)
        elif path is not None and os.path.realpath(path) == os.path.realpath(pattern.previous_mask):
            yield UserError("pattern.previous_mask: this stage writes the same file", wanted="another file", got=path)


def pattern_stands_alone(stages: tuple[StageEntry, ...]) -> Iterator[UserError]:
    """Checks that a recipe does not combine gates and patterns, which would need masks of both kinds at once."""
    names = [entry.name for entry in stages]
    others = [name for name in names if name not in ("pretrain", "pattern", "quantize")]
    if "pattern" in names and others:
        what = "stages: pattern cannot be combined with stages that learn gates"
        remedy = "make the smaller model first, and prune its weights in a second run"
        yield UserError(what, wanted="pretrain, pattern and quantize only", got=", ".join(names), remedy=remedy)
