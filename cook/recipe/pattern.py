"""The mask of a pattern stage: read if it exists, else made from scores with frozen weights, and written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from cook.base import distributed
from cook.base.distributed import on_all_ranks, on_first_rank, say
from cook.base.errors import UserError
from cook.base.files import sha256
from cook.base.tensor_files import LazyTensors
from cook.base.watchdog import At
from cook.config.types import two_of_four
from cook.recipe.inputs import Inputs
from cook.recipe.plan import Stage
from cook.recipe.stage_data import Loader
from cook.report.events import EventLog
from cook.sparsity.matrices import PrunedMatrix, matrices_of, restricted
from cook.sparsity.pattern_file import read_pattern_masks, write_pattern_masks
from cook.sparsity.pattern_masks import make_masks, sparsity_table
from cook.sparsity.scores import ScoreAccumulator
from cook.sparsity.spec import PatternSpec, Quirks
from cook.training.checkpoint import Position
from cook.training.engine import Engine
from cook.training.loop import Run, train

Masks = dict[str, torch.Tensor]


def pattern_spec(stage: Stage) -> PatternSpec:
    """The pattern that a stage's config names; 2:4 without a section uses the magnitude of weights."""
    pattern, named = stage.config.pattern, two_of_four(stage.config.pruning)
    if pattern is None:
        assert named is not None, "the config loader requires the section pattern"
        return PatternSpec(type=named, score="magnitude")
    first, second = pattern.local_granularities
    return PatternSpec(
        type=named or pattern.type,
        granularity=pattern.granularity,
        local_granularities=(first, second),
        block=pattern.block,
        vector=pattern.vector,
        score=pattern.score,
        quirks=Quirks(**dict.fromkeys(pattern.quirks, True)),
    )


def pattern_identity(stage: Stage) -> list[str]:
    """Hashes of the masks that determine the stage's outcome: its own, and the one it was made from."""
    pattern = stage.config.pattern
    if stage.pattern_mask is None:
        return []
    return [sha256(path) for path in (stage.pattern_mask, pattern.previous_mask if pattern else None) if path]


def masked_weights(weights: Mapping[str, torch.Tensor], masks: Masks) -> LazyTensors:
    """The weights with the masks applied; each is computed on access."""

    def masked(name: str) -> torch.Tensor:
        return weights[name].masked_fill(masks[name] == 0, 0.0) if name in masks else weights[name]

    return LazyTensors({name: partial(masked, name) for name in weights})


def pattern_masks(
    stage: Stage,
    inputs: Inputs,
    open_batches: Callable[[], Loader],
    build: Callable[[], torch.nn.Module],
    at: At,
    resume: str,
) -> Masks:
    """The mask of a pattern stage, by path; empty for other stages.

    Args:
        stage: The plan.
        inputs: The model.
        open_batches: Opens the calibration data for the scores: the first training rows of the stage.
        build: Builds the model.
        at: Called at every step, for a watchdog.
        resume: `never`: a mask that an earlier run made in the run's output folder is made again. A mask elsewhere was
            given to the run and is used.

    Raises:
        UserError: the mask file belongs to another model or other settings, or a size does not divide evenly.
    """
    if stage.pattern_mask is None:
        return {}
    path, spec = Path(stage.pattern_mask), pattern_spec(stage)
    matrices = restricted(matrices_of(inputs.space), stage.config.pruning.pruned_module, inputs.adapter.aliases)
    anew = resume == "never" and path in stage.traces()
    if anew or not distributed.broadcast(path.exists()):
        made = _made(stage, spec, inputs, matrices, open_batches, build, at)
        on_first_rank(lambda: write_pattern_masks(path, made, stage.pattern_settings()))
    masks, record = on_all_ranks(lambda: read_pattern_masks(path, matrices))
    if record != _plain(stage.pattern_settings()):
        raise UserError(
            f"{path}: this mask was made with other settings",
            wanted=stage.pattern_settings(),
            got=record,
            remedy="delete it to make a new one, set another pruning_mask_path, or start from it with previous_mask",
        )
    table = sparsity_table(matrices, masks, quirks=spec.quirks)
    say(f"{stage.name}: {spec.name}, {100 * table.total:.2f}% of {len(matrices)} matrices pruned")
    return masks


def gather_scores(scorer: ScoreAccumulator, matrices: Sequence[PrunedMatrix], run: Run) -> None:
    """Adds the gradients of a short training, whose learning rate is 0, to the scores.

    Args:
        scorer: The scores.
        matrices: The matrices that are scored.
        run: The training, which saves nothing.
    """
    paths = [matrix.path for matrix in matrices]
    run.engine.on_gradients = lambda: scorer.add(run.engine.full_gradients(paths))
    with EventLog(run.checkpoints, tensorboard=False, enabled=False) as log:
        train(run, Position(step=0, tokens=0), log)


def check_divisible(matrices: Sequence[PrunedMatrix], spec: PatternSpec) -> None:
    """Checks that the pattern divides every matrix evenly, before hours of scoring.

    Raises:
        UserError: a size does not divide evenly.
    """
    make_masks({m.path: torch.ones(m.shape) for m in matrices}, tuple(matrices), spec, sparsity=0.0)


def _plain(settings: dict) -> dict:
    """The settings after a round trip through JSON."""
    return json.loads(json.dumps(settings))


def _made(
    stage: Stage,
    spec: PatternSpec,
    inputs: Inputs,
    matrices: tuple[PrunedMatrix, ...],
    open_batches: Callable[[], Loader],
    build: Callable[[], torch.nn.Module],
    at: At,
) -> Masks:
    pattern = stage.config.pattern
    check_divisible(matrices, spec)
    previous = None
    if pattern and pattern.previous_mask:
        previous, _ = read_pattern_masks(pattern.previous_mask, matrices)
    assert inputs.weights is not None, "a pattern stage has initial weights"
    scorer = ScoreAccumulator(matrices, inputs.weights, masks=previous, score=spec.score)
    if spec.score != "magnitude":
        assert pattern is not None
        training = dataclasses.replace(
            stage.config.training,
            steps=pattern.scoring_steps,
            learning_rate=0.0,
            weight_decay=0.0,
            warmup=0.0,
            schedule="constant",
            train_weights=True,
        )
        settings = {key: value for key, value in stage.config.deepspeed.items() if key != "scheduler"}
        form, on_host = inputs.adapter.call_form(inputs.model_config), inputs.adapter.on_host
        engine = Engine(build, inputs.weights, training, settings, call_form=form, on_host=on_host)
        with closing(open_batches()) as batches:
            run = Run(
                name=f"{stage.name}, scores",
                engine=engine,
                batches=batches,
                training=training,
                checkpoints=stage.folder,
                saves=False,
                at=at,
            )
            gather_scores(scorer, matrices, run)
        engine.close()
    sparsity = pattern.sparsity if pattern else 50.0
    return make_masks(scorer.scores(), matrices, spec, sparsity=sparsity, previous=previous)
