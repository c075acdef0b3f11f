"""What a stage of a language model writes: its masks, its model, and its record in `done.json`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from cook.base import distributed
from cook.base.files import sha256
from cook.export.model_folder import copy_generation_config, write_model_folder, write_tokenizer
from cook.pruning.compensation import with_bias
from cook.pruning.counts import parameters
from cook.pruning.gates import Gates
from cook.pruning.mask_file import write_mask_file
from cook.pruning.mask_set import FINE_KEYS, Masks, coarse_to_tensors, consistent, fine_to_tensors, kept_counts
from cook.pruning.units import PruningSpace
from cook.recipe.compact import whole_weights
from cook.recipe.inputs import Inputs, final_masks
from cook.recipe.kept_structure import describe_structure
from cook.recipe.moefy import dense_loss, experts_record
from cook.recipe.plan import MaskPaths, Stage
from cook.recipe.stage_data import rows_before
from cook.text.tokenizer import Tokenizer
from cook.training.checkpoint import Position
from cook.training.engine import Engine, write_gathered


def write_masks(stage: Stage, inputs: Inputs, gates: Gates | None) -> None:
    """Writes the learned masks of each size, on the first rank."""
    if gates is None or distributed.rank() != 0:
        return
    for number, writes in enumerate(stage.by_size(stage.writes)):
        _write_size(inputs.space, writes, final_masks(stage, inputs, gates, number))


def _write_size(space: PruningSpace, writes: MaskPaths, masks: Masks) -> None:
    if writes.layer:
        write_mask_file(writes.layer, coarse_to_tensors(space, masks))
    files = {kind: path for kind in FINE_KEYS if (path := getattr(writes, kind))}
    tensors = fine_to_tensors(space, masks) if files else {}
    for kind, path in files.items():
        elsewhere = {FINE_KEYS[other] for other in files if other != kind}
        write_mask_file(path, {key: tensor for key, tensor in tensors.items() if key not in elsewhere})


def write_model(
    stage: Stage, inputs: Inputs, trained: Inputs, tokenizer: Tokenizer, engine: Engine, gates: Gates | None
) -> None:
    """Writes the trained model to the stage's folder, in the layout of the whole model; all ranks call it.

    Args:
        stage: The plan.
        inputs: The inputs with the whole model.
        trained: Those that were trained: the same, or without masked units, whose weights are then put back.
        tokenizer: The model's tokenizer.
        engine: The trained model.
        gates: The masks that were learned, whose removed units may leave their means as a bias.
    """
    folder = stage.folder / "model"

    def write(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        if gates and gates.means:
            masks = consistent(trained.space, gates.binary())
            weights = with_bias(weights, trained.space, masks, gates.means)
        if trained is not inputs:
            weights = whole_weights(weights, inputs, torch.float32 if stage.config.training.train_weights else None)
        try:
            write_model_folder(folder, inputs.adapter, inputs.model_config, weights)
            write_tokenizer(folder, tokenizer)
            if inputs.folder is not None:
                copy_generation_config(inputs.folder, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete model could be taken for a complete one
            raise

    write_gathered(engine, write)


def stage_record(
    stage: Stage,
    inputs: Inputs,
    gates: Gates | None,
    *,
    position: Position,
    data: Mapping[str, Any],
    losses: Sequence[float | None],
) -> dict[str, Any]:
    """What `done.json` says of a finished stage, apart from its quantization.

    Args:
        stage: The plan.
        inputs: The inputs with the whole model.
        gates: The masks that are learned; None if none are.
        position: Where the training ended.
        data: The state of the loader.
        losses: The held-out loss of each size.
    """
    files = [*stage.mask_files(), *([stage.pattern_mask] if stage.pattern_mask else [])]
    models = [
        {
            "held_out_loss": loss,
            "parameters": parameters(inputs.space, kept_counts(masks)),
            "structure": describe_structure(inputs.space, masks),
        }
        for number, loss in enumerate(losses)
        for masks in [final_masks(stage, inputs, gates, number)]
    ]
    sizes = [{"size": size, **model} for size, model in zip(stage.sizes, models, strict=False)]
    return {
        "steps": position.step,
        "tokens": position.tokens,
        "rows": rows_before(stage) + position.step * stage.config.training.train_batch_size,
        "data": data,
        **models[0],
        **({"sizes": sizes} if sizes else {}),
        **experts_record(inputs),
        **dense_loss(stage),
        "head_unit": inputs.head_unit,
        "masks": {path: sha256(path) for path in files},
    }
