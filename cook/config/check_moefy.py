"""Checks of the `MoEfication` section: its stage, and numbers of experts that fit together."""

from __future__ import annotations

from collections.abc import Iterator

from cook.base.errors import UserError
from cook.config.facts import ModelFacts
from cook.config.moefy import MoefyConfig
from cook.config.types import JointConfig, PruningConfig, StageEntry


def section_fits_stages(
    moefy: MoefyConfig | None, pruning: PruningConfig, stages: tuple[StageEntry, ...], joint: JointConfig | None
) -> Iterator[UserError]:
    """Checks that the stage has its section, the section its stage, and that nothing is pruned after it."""
    names = [entry.name for entry in stages]
    is_on = moefy is not None and moefy.is_moefy
    if "moefy" in names and not is_on:
        wanted = "a section with is_moefy true, for stages.moefy"
        yield UserError("MoEfication: missing" if moefy is None else "MoEfication.is_moefy: false", wanted=wanted)
    if is_on and "moefy" not in names and (names or pruning.is_pruning):
        yield UserError(
            "MoEfication: no stage uses it",
            wanted='{"name": "moefy"} among the stages',
            got=", ".join(names) or "pruning.is_pruning true and no stages",
            remedy="add the stage behind those that prune, or set MoEfication.is_moefy to false",
        )
    if "moefy" not in names:
        return
    behind = [name for name in names[names.index("moefy") + 1 :] if name not in ("random_baseline", "quantize")]
    if behind:
        remedy = "put moefy after the stages that pretrain and prune, and before quantize"
        yield UserError("stages: nothing but quantize can follow moefy", got=", ".join(names), remedy=remedy)
    before = set(names[: names.index("moefy")])
    if (
        moefy
        and moefy.masked_dims == "route"
        and not before & {"ffn_mask", "ffn_finetune", "joint_mask", "joint_finetune"}
    ):
        what = 'MoEfication.masked_dims: "route" needs a mask of FFN dims'
        yield UserError(what, wanted="ffn_mask or joint_mask before moefy", got=", ".join(names))
    if joint and joint.sizes:
        got, remedy = f"{len(joint.sizes)} sizes in joint", "remove moefy, or give one share"
        yield UserError("stages: moefy makes one model, and the scheme has several sizes", got=got, remedy=remedy)
    own = stages[names.index("moefy")].training
    if moefy is not None and moefy.steps is not None and own.get("steps", moefy.steps) != moefy.steps:
        what = "MoEfication.steps: differs from stages.moefy.training.steps"
        yield UserError(what, wanted=own["steps"], got=moefy.steps, remedy="leave one of them out")


def experts_fit(moefy: MoefyConfig | None, facts: ModelFacts) -> Iterator[UserError]:
    """Checks that a token can use the share of the experts, and that the blocks have a dim for each expert."""
    if moefy is None or not moefy.is_moefy:
        return
    if moefy.shared >= moefy.experts:
        wanted = f"fewer than MoEfication.experts, {moefy.experts}"
        yield UserError("MoEfication.shared: no experts are left to choose from", wanted=wanted, got=moefy.shared)
    elif round(moefy.active * moefy.experts) <= moefy.shared:
        least = (moefy.shared + 1) / moefy.experts
        yield UserError(
            f"MoEfication.active: the {moefy.shared} shared of {moefy.experts} experts leave a token none to choose",
            wanted=f"at least {least:g}",
            got=moefy.active,
            remedy="give more experts, or fewer shared ones",
        )
    if facts.dim_ff is not None and facts.dim_ff < moefy.experts:
        what = "MoEfication.experts: more experts than an FFN block has dims"
        yield UserError(what, wanted=f"at most {facts.dim_ff}", got=moefy.experts)
