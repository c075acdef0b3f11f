"""Export of the compact model of the last finished pruning stage: writing, comparison, evaluation and timing.

In floating point the compact model is equal to the masked one up to rounding. In int8 it is an approximation.
"""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from cook.base.distributed import say
from cook.base.errors import UserError
from cook.base.files import write_json
from cook.base.watchdog import At
from cook.config.tasks import TaskConfig
from cook.evaluation.all_ranks import predict
from cook.evaluation.speed import forward_seconds, median_seconds
from cook.families.encoder import load_encoder
from cook.recipe.benchmarks import task_plan as plan
from cook.recipe.benchmarks.session import Session, write_results
from cook.recipe.benchmarks.task_stages import open_session, pruned_matrices
from cook.report.tables import human_count
from cook.sparsity.matrices import PrunedMatrix
from cook.sparsity.pattern_file import read_pattern_masks
from cook.sparsity.sparse_export import export_sparse

TIMED_ROWS = 32
FLOAT_ROUNDING = "rounding of fp32: the models are equal"
INT8_ROUNDING = "weights and activations in 8 bits: the models are not equal"
"""Where the difference of the outputs comes from."""


def run_export(config: TaskConfig, at: At) -> None:
    """Exports the last finished stage of those in the config.

    Raises:
        UserError: no stage has finished, or this kind of model cannot be exported.
    """
    spec = plan.pattern_spec(config)
    done = [stage for stage in plan.prune_stages(config) if stage.done.is_file()]
    if not done:
        raise UserError(
            f"{plan.prune_folder(config)}: no stage has finished", remedy="run the mode prune first, with these options"
        )
    stage, output = done[-1], plan.prune_folder(config) / ("export_int8" if config.int8 else "export")
    masked = stage.folder / "model"
    at(0, "preparing")
    session = open_session(config, str(masked))
    for note in (*session.encoder.notes, *session.data.notes):
        say(note)
    at(0, "starting")
    matrices: tuple[PrunedMatrix, ...] = pruned_matrices(session.encoder)
    masks, _ = read_pattern_masks(stage.masks, matrices)
    block = spec.block if spec.name == "block_wise" else None
    result = export_sparse(masked, output, masks, block=block, int8=config.int8)
    shutil.copyfile(stage.masks, output / stage.masks.name)
    models = {"masked": load_encoder(masked, session.info.head), "compact": load_encoder(output, session.info.head)}
    scores, difference = _compare(session, models)
    rows = session.data.evaluations[0].rows
    batch = rows.batch(np.argsort(rows.lengths, kind="stable")[-TIMED_ROWS:])
    seconds = forward_seconds(models, [batch], torch.device("cpu"))
    speed_ups = _matrix_speed_ups(models["compact"])
    before, after = result.parameters
    metric, ratio = session.info.main_metric, seconds["masked"] / seconds["compact"]
    found = {
        "task": session.info.name,
        "pattern": spec.name,
        "asked_sparsity": stage.sparsity,
        "kind": result.kind,
        "int8": config.int8,
        "parameters": {"before": before, "after": after},
        "metrics": scores,
        "largest_relative_difference": difference,
        "difference_is_from": INT8_ROUNDING if config.int8 else FLOAT_ROUNDING,
        "speed_up_on_this_cpu": ratio,
        "speed_up_by_matrix": speed_ups,
        "notes": list(result.notes),
    }
    write_json(output / "export.json", found)
    write_results(output / "eval_results.txt", {f"{session.info.name}, {name}": scores[name] for name in models})
    for note in result.notes:
        say(f"note: {note}")
    say(
        f"{output}: a {result.kind} model, {human_count(before)} → {human_count(after)} parameters; "
        f"{metric} {scores['masked'][metric]:.2f} → {scores['compact'][metric]:.2f}; largest relative difference "
        f"of its outputs {difference:.1e}, from {found['difference_is_from']}; {ratio:.2f}× "
        "as fast as the masked one on this CPU"
    )


@torch.inference_mode()
def _matrix_speed_ups(compact: torch.nn.Module) -> dict[str, float]:
    """Each tiled layer's speed relative to a dense product of its size, for 128 rows."""
    found = {}
    for name, layer in compact.named_modules():
        if hasattr(layer, "dense_weight") and layer.in_features and layer.out_features:
            dense, x = layer.dense_weight(), torch.randn(128, layer.in_features)
            is_int8 = layer.weight.dtype == torch.int8
            tiled = partial(layer, x) if is_int8 else partial(layer.columns, x.T.contiguous())
            actions = {"dense": partial(F.linear, x, dense), "tiled": tiled}
            seconds = median_seconds(actions, torch.device("cpu"), repeats=9)
            found[name] = round(seconds["dense"] / seconds["tiled"], 3)
    return found


def _compare(session: Session, models: dict[str, torch.nn.Module]) -> tuple[dict[str, dict[str, float]], float]:
    """The metrics of both models in fp32, and the largest relative difference of their outputs."""
    scores: dict[str, dict[str, float]] = {name: {} for name in models}
    difference = 0.0
    for evaluation in session.data.evaluations:
        outputs = {
            name: predict(
                model,
                evaluation.rows,
                names=session.info.outputs,
                batch_size=session.config.eval_batch_size,
                device=torch.device("cpu"),
            )
            for name, model in models.items()
        }
        for name, values in outputs.items():
            scores[name] |= {key: round(value, 4) for key, value in evaluation.score(values).metrics.items()}
        for one, other in zip(outputs["masked"], outputs["compact"], strict=True):
            scale = max(float(np.abs(array).max()) for array in one)
            gap = max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
            difference = max(difference, gap / scale)
    return scores, difference
