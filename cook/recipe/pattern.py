"""The pattern stage's mask: read where it has been made, else scored with the weights frozen and written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from cook.base import distributed
from cook.base.distributed import say
from cook.base.errors import UserError
from cook.base.files import sha256
from cook.base.tensor_files import LazyTensors
from cook.base.together import on_all_ranks, on_first_rank
from cook.base.watchdog import At
from cook.config.types import TrainingConfig
from cook.data.training_data import TrainingData
from cook.recipe.inputs import Inputs
from cook.recipe.plan import Stage
from cook.recipe.stage_data import open_loader
from cook.report.events import EventLog
from cook.sparsity.matrices import PrunedMatrix, matrices_of, restricted
from cook.sparsity.pattern_file import read_pattern_masks, write_pattern_masks
from cook.sparsity.pattern_masks import make_masks, sparsity_table
from cook.sparsity.scores import ScoreAccumulator
from cook.sparsity.spec import PatternSpec, Quirks
from cook.training.engine import Engine
from cook.training.loop import Run, train
from cook.training.saver import Position

Masks = dict[str, torch.Tensor]


def pattern_spec(stage: Stage) -> PatternSpec:
    """The pattern that a stage's config names. 2:4 without a section goes by the weights' magnitude."""
    pattern, method = stage.config.pattern, stage.config.pruning.mask_method
    if pattern is None:
        return PatternSpec(type=method, score="magnitude")
    first, second = pattern.local_granularities
    return PatternSpec(
        type=pattern.type if method == "pattern" else method,
        granularity=pattern.granularity,
        local_granularities=(first, second),
        block=pattern.block,
        vector=pattern.vector,
        score=pattern.score,
        quirks=Quirks(**dict.fromkeys(pattern.quirks, True)),
    )


def pattern_identity(stage: Stage) -> list[str]:
    """The content of the masks that decide the stage's outcome: its own, and the one that it was made from."""
    pattern = stage.config.pattern
    if stage.pattern_mask is None:
        return []
    return [sha256(path) for path in (stage.pattern_mask, pattern.previous_mask if pattern else None) if path]


def masked_weights(weights: Mapping[str, torch.Tensor], masks: Masks) -> LazyTensors:
    """The weights with 0 wherever a mask is, each made when it is asked for."""

    def masked(name: str) -> torch.Tensor:
        return weights[name].masked_fill(masks[name] == 0, 0.0) if name in masks else weights[name]

    return LazyTensors({name: partial(masked, name) for name in weights})


def pattern_masks(
    stage: Stage,
    inputs: Inputs,
    data: TrainingData,
    build: Callable[[], torch.nn.Module],
    at: At,
    *,
    anew: bool = False,
) -> Masks:
    """The mask of a pattern stage, by path; empty for other stages.

    Args:
        stage: The plan.
        inputs: The model.
        data: What the weights are scored on: the rows with which the training of the stage begins.
        build: Makes the model.
        at: Told of every step.
        anew: True: a mask in the run's own output folder, which an earlier run made, is made again. One elsewhere was
            given to the run and is held.

    Raises:
        UserError: the file holds a mask of another model or made with other settings, or a size does not divide.
    """
    if stage.pattern_mask is None:
        return {}
    path = Path(stage.pattern_mask)
    allowed = stage.config.pruning.pruned_module
    matrices = restricted(matrices_of(inputs.space), allowed, inputs.adapter.aliases)
    anew = anew and path.resolve().is_relative_to(Path(stage.config.output_dir).resolve())
    if anew or not distributed.broadcast(path.exists()):
        made = _made(stage, inputs, data, build, at, matrices)
        on_first_rank(lambda: write_pattern_masks(path, made, stage.pattern_settings()))
    masks, record = on_all_ranks(lambda: read_pattern_masks(path, matrices))
    if record != _plain(stage.pattern_settings()):
        raise UserError(
            f"{path}: a mask made with other settings",
            wanted=stage.pattern_settings(),
            got=record,
            remedy="remove it to make it anew, name another pruning_mask_path, or start from it with previous_mask",
        )
    spec = pattern_spec(stage)
    table = sparsity_table(matrices, masks, quirks=spec.quirks)
    say(f"{stage.name}: {spec.name}, {100 * table.total:.2f}% of {len(matrices)} matrices pruned")
    return masks


def _plain(settings: dict) -> dict:
    """As JSON gives it back."""
    return json.loads(json.dumps(settings))


def _made(
    stage: Stage,
    inputs: Inputs,
    data: TrainingData,
    build: Callable[[], torch.nn.Module],
    at: At,
    matrices: tuple[PrunedMatrix, ...],
) -> Masks:
    spec, pattern = pattern_spec(stage), stage.config.pattern
    sparsity = pattern.sparsity if pattern else 50.0
    # A size that does not divide is a mistake to tell before the hours of scoring.
    make_masks({m.path: torch.ones(m.shape) for m in matrices}, matrices, spec, sparsity=0.0)
    previous = None
    if pattern and pattern.previous_mask:
        previous, _ = read_pattern_masks(pattern.previous_mask, matrices)
    assert inputs.weights is not None, "a pattern stage has weights to start from"
    scorer = ScoreAccumulator(matrices, inputs.weights, masks=previous, score=spec.score)
    if spec.score != "magnitude":
        assert pattern is not None
        _gather(stage, inputs, data, build, at, pattern.scoring_steps, scorer, matrices)
    return make_masks(scorer.scores(), matrices, spec, sparsity=sparsity, previous=previous)


def _gather(
    stage: Stage,
    inputs: Inputs,
    data: TrainingData,
    build: Callable[[], torch.nn.Module],
    at: At,
    steps: int,
    scorer: ScoreAccumulator,
    matrices: tuple[PrunedMatrix, ...],
) -> None:
    """Runs the steps whose gradients are scored, at a learning rate of 0, on an engine of their own."""
    training = _frozen(stage.config.training, steps)
    settings = {key: value for key, value in stage.config.deepspeed.items() if key != "scheduler"}
    engine = Engine(build, inputs.weights, training, settings, call_form=inputs.adapter.inputs)
    paths = [matrix.path for matrix in matrices]
    engine.on_gradients = lambda: scorer.add(engine.full_gradients(paths))
    loader = open_loader(stage, data, ledger=False)
    run = Run(
        name=f"{stage.name}, scores",
        engine=engine,
        batches=loader,
        training=training,
        attached=None,
        gates=None,
        extra_loss=None,
        checkpoints=stage.folder,
        saves=False,
        at=at,
        fingerprint="",
        on_save=lambda: None,
    )
    with EventLog(stage.folder, tensorboard=False, enabled=False) as log:
        try:
            train(run, Position(step=0, tokens=0), log)
        finally:
            loader.close()
    engine.close()


def _frozen(training: TrainingConfig, steps: int) -> TrainingConfig:
    return dataclasses.replace(
        training, steps=steps, learning_rate=0.0, weight_decay=0.0, warmup=0.0, schedule="constant", train_weights=True
    )
