"""The stage `moefy`: the model without its masked units, whose FFN blocks become mixtures of experts.

The experts and the first weights of the routers are chosen from the activations of the dense model, without training,
and written to a file that a resumed stage reads. Then the stage trains like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from cook.base import distributed
from cook.base.batches import Batch, on_device
from cook.base.distributed import on_all_ranks, on_first_rank, say
from cook.base.errors import UserError
from cook.base.files import sha256, write_atomically
from cook.base.seeds import generator
from cook.base.tensor_files import LazyTensors
from cook.base.watchdog import At
from cook.data.packing import NO_TARGET
from cook.data.token_loss import model_inputs
from cook.pruning.carving import (
    Carving,
    ExpertSizes,
    active_when_carved,
    carve,
    carved_weights,
    described,
    expert_sizes,
    ffn_groups,
)
from cook.pruning.ffn_samples import FfnSamples
from cook.pruning.reshape import kept_units, reshaped
from cook.pruning.units import UnitGroup
from cook.recipe.inputs import Inputs, open_inputs
from cook.recipe.plan import Stage
from cook.recipe.stage_data import Loader
from cook.training.engine import Engine

EXPERTS = "experts.safetensors"
"""The file in the stage's folder with the order of the dims and the first routers."""
DENSE_LOSS = "dense_held_out_loss"
"""The loss of the dense model, in that file and in `done.json`."""
TOKENS = 4096
"""Tokens whose activations are kept, to carve the blocks."""
ROUTED_WEIGHT = 0.25
"""What the energy of a dim counts that a mask removes, if it is routed."""
Carvings = list[tuple[UnitGroup, Carving]]


@dataclass(frozen=True, kw_only=True)
class DenseInputs(Inputs):
    """The dense model whose blocks become mixtures of experts."""

    preferred: dict[str, torch.Tensor]
    """1 for the FFN dims that the masks keep and 0 for others, by group; empty if the masks are applied."""


def open_dense(stage: Stage) -> DenseInputs:
    """The inputs of the stage, without the units that the masks of earlier stages remove.

    Raises:
        UserError: as `open_inputs`; or the model's family, its blocks and the section do not fit together.
    """
    opened, moefy = open_inputs(stage), stage.config.moefy
    groups, masks = opened.space.of("dimff"), opened.fixed
    preferred: list[torch.Tensor] = []
    if moefy and moefy.masked_dims == "route":
        names = {group.name for group in groups}
        removed = {name for name, mask in masks.items() if name not in names and not mask.any()}
        stay = [group for group in groups if opened.space.block(group).name not in removed]
        preferred = [masks.get(group.name, torch.ones(group.size)) for group in stay]
        masks = {name: mask for name, mask in masks.items() if name not in names}
    inputs = DenseInputs(**{field.name: getattr(opened, field.name) for field in fields(opened)}, preferred={})
    if masks:
        assert inputs.weights is not None
        shrunk = inputs.adapter.shrink(inputs.model_config, inputs.space, kept_units(inputs.space, masks))
        small = reshaped(inputs.weights, inputs.space, masks)
        readers = {shrunk.renamed.get(path, path): partial(small.__getitem__, path) for path in small}
        inputs = replace(
            inputs,
            model_config=shrunk.config,
            weights=LazyTensors(readers),
            space=inputs.adapter.space(shrunk.config, inputs.head_unit),
        )
    check_blocks(stage, inputs)
    # Layers may have been renumbered, but their order is the same.
    left = inputs.space.of("dimff")
    by_name = {group.name: mask for group, mask in zip(left, preferred, strict=True)} if preferred else {}
    return replace(inputs, fixed={}, preferred=by_name)


def check_blocks(stage: Stage, inputs: Inputs) -> None:
    """Checks that the blocks of the model can have the experts of the section; raises a UserError."""
    if inputs.adapter.with_experts is None:
        raise UserError(
            f"models of the family {inputs.adapter.family} cannot have experts",
            remedy="give its adapter the functions experts and with_experts (cook.pruning.family.Adapter)",
        )
    for group in groups_of(stage, inputs):
        sizes_of(stage, group)


def groups_of(stage: Stage, inputs: Inputs) -> tuple[UnitGroup, ...]:
    """The FFN dims of the blocks that become mixtures of experts."""
    assert stage.config.moefy is not None
    return ffn_groups(inputs.space, stage.config.moefy.first_FFN_module, inputs.adapter.aliases)


def sizes_of(stage: Stage, group: UnitGroup) -> ExpertSizes:
    """The experts of a block."""
    moefy = stage.config.moefy
    assert moefy is not None
    return expert_sizes(group.size, experts=moefy.experts, shared=moefy.shared, active=moefy.active)


def experts_identity(stage: Stage) -> list[str]:
    """The hash of the experts that determine the stage's outcome."""
    return [sha256(stage.folder / EXPERTS)] if stage.is_moefy else []


def experts_record(inputs: Inputs) -> dict[str, Any]:
    """What `done.json` says of a model's experts; nothing if it has none."""
    experts = inputs.adapter.experts(inputs.model_config)
    if not experts:
        return {}
    return {"active_parameters": active_when_carved(inputs.space, experts)}


def dense_loss(stage: Stage) -> dict[str, Any]:
    """The held-out loss of the dense model, for `done.json`; nothing in other stages, or if it was not measured."""
    if not stage.is_moefy:
        return {}
    found = load_file(stage.folder / EXPERTS).get(DENSE_LOSS)
    return {} if found is None else {DENSE_LOSS: float(found)}


def with_experts(
    stage: Stage,
    inputs: Inputs,
    open_batches: Callable[[], Loader],
    build: Callable[[], torch.nn.Module],
    measure: Callable[[Engine], float | None],
    at: At,
    resume: str,
) -> Inputs:
    """The inputs of the training: the model with experts.

    Args:
        stage: The plan.
        inputs: The dense model.
        open_batches: Opens the calibration data: the first training rows of the stage.
        build: Builds the dense model.
        measure: Measures the held-out loss of a model.
        at: Called at every batch, for a watchdog.
        resume: `never`: experts that an earlier run has chosen are chosen again.
    """
    assert isinstance(inputs, DenseInputs)
    path, groups, settings = stage.folder / EXPERTS, groups_of(stage, inputs), {"fingerprint": stage.fingerprint()}
    if resume == "never" or not on_first_rank(lambda: _described(path) == settings):
        made = _carved(stage, inputs, groups, open_batches, build, measure, at)
        on_first_rank(lambda: write_atomically(path, save(made, metadata=settings)))
    carvings = on_all_ranks(lambda: _read(path, stage, groups))
    kept = sum(carving.kept for _, carving in carvings) / len(carvings)
    say(f"{stage.name}: {len(carvings)} FFN blocks; the chosen experts have {100 * kept:.1f}% of the energy on average")
    return moefied(inputs, carvings)


def moefied(inputs: Inputs, carvings: Carvings) -> Inputs:
    """The same inputs with experts."""
    assert inputs.weights is not None and inputs.adapter.with_experts is not None
    experts = dict(described(group, carving) for group, carving in carvings)
    config = inputs.adapter.with_experts(inputs.model_config, experts)
    return replace(
        inputs,
        model_config=config,
        weights=carved_weights(inputs.weights, carvings),
        space=inputs.adapter.space(config, inputs.head_unit),
    )


def _carved(
    stage: Stage,
    inputs: DenseInputs,
    groups: tuple[UnitGroup, ...],
    open_batches: Callable[[], Loader],
    build: Callable[[], torch.nn.Module],
    measure: Callable[[Engine], float | None],
    at: At,
) -> dict[str, torch.Tensor]:
    """Reads the calibration batches, the same on every rank, and carves the blocks, each on one of the ranks.

    Returns the content of the file.
    """
    moefy = stage.config.moefy
    assert moefy is not None and inputs.weights is not None
    rank, world = distributed.rank(), distributed.world_size()
    own = groups[rank::world]
    training = replace(stage.config.training, train_weights=False)
    settings = {key: value for key, value in stage.config.deepspeed.items() if key != "scheduler"}
    form, on_host = inputs.adapter.call_form(inputs.model_config), inputs.adapter.on_host
    engine = Engine(build, inputs.weights, training, settings, call_form=form, on_host=on_host)
    engine.module.eval()
    samples = FfnSamples(engine.module, own)
    random = generator(stage.config.seed, stage.name, "tokens")
    per_row = -(-TOKENS // (moefy.calibration_steps * stage.config.training.train_batch_size))
    with closing(open_batches()) as loader, torch.no_grad():
        for step in range(moefy.calibration_steps):
            at(0, "starting")
            batches = loader.micro_batches(step, rank, world, stage.config.training.rows_at_once(world))
            every = [batch for part in distributed.gather(batches) for batch in part]
            for batch in every:
                samples.at(_sampled(batch, per_row, random))
                engine(**model_inputs(on_device(batch, engine.device)))
    samples.remove()
    loss = measure(engine)
    engine.close()
    made: dict[str, Carving] = {}
    for group in own:
        at(0, "preparing")
        out = group.slices[-1]
        columns = inputs.weights[out.path].float().norm(dim=1 - out.dim)
        seen, energy = samples.of(group, columns)
        if group.name in inputs.preferred:
            energy = energy * (ROUTED_WEIGHT + (1 - ROUTED_WEIGHT) * inputs.preferred[group.name])
        made[group.name] = carve(seen, energy, sizes_of(stage, group))
    by_name = {name: carving for part in distributed.gather(made) for name, carving in part.items()}
    tensors = _as_tensors([(group, by_name[group.name]) for group in groups])
    return tensors if loss is None else tensors | {DENSE_LOSS: torch.tensor(loss, dtype=torch.float64)}


def _sampled(batch: Batch, per_row: int, random: torch.Generator) -> torch.Tensor:
    """Positions with a target, so many per row at most; the same ones however the rows are divided into batches."""
    found = []
    for number, targets in enumerate(batch["targets"]):
        positions = (targets != NO_TARGET).nonzero().flatten()
        chosen = torch.randperm(len(positions), generator=random)[:per_row].sort().values
        found.append(number * len(targets) + positions[chosen])
    return torch.cat(found)


def _described(path: Path) -> dict[str, str] | None:
    """The settings with which a file of experts was made; None if there is no file."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _as_tensors(carvings: Carvings) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for group, carving in carvings:
        parts = {"order": carving.order, "weight": carving.weight, "bias": carving.bias}
        parts["kept"] = torch.tensor(carving.kept, dtype=torch.float64)
        tensors |= {f"{group.name}.{name}": part.contiguous() for name, part in parts.items()}
    return tensors


def _read(path: Path, stage: Stage, groups: tuple[UnitGroup, ...]) -> Carvings:
    tensors: Mapping[str, torch.Tensor] = load_file(path)
    found = []
    for group in groups:
        parts = {name: tensors[f"{group.name}.{name}"] for name in ("order", "weight", "bias")}
        kept = float(tensors[f"{group.name}.kept"])
        found.append((group, Carving(sizes=sizes_of(stage, group), kept=kept, **parts)))
    return found
