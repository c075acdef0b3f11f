"""`cook moefy`: the configuration file that the command stands for, and the table at its end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from cook.base.files import read_json, write_json
from cook.config.moefy import MoefyJob
from cook.families.source import open_model
from cook.pruning.counts import parameters
from cook.recipe.moefy import DENSE_LOSS
from cook.recipe.one_line import base_recipe, check_output, check_same, local_model, matrices, planned
from cook.report.tables import human_count, markdown_table
from cook.text.hf import check_has_tokenizer


def write_moefy_recipe(job: MoefyJob) -> tuple[Path, dict[str, Any]]:
    """Writes `recipe/bmcook.json` below the output folder, unless it is there.

    Returns:
        Its path, and the plan (`cook.recipe.start.make_plan`).

    Raises:
        UserError: unknown model or data, numbers of experts that do not fit, or the folder has the recipe of another
            job; nothing is written then.
    """
    files, folder = {"bmcook.json": _recipe(job)}, Path(job.output) / "recipe"
    check_same(folder, files)
    with tempfile.TemporaryDirectory(prefix="cook-plan-") as name:
        plan = planned(files, Path(name))
    path = folder / "bmcook.json"
    if not path.exists():
        write_json(path, files["bmcook.json"])
    return path, plan | {"config": str(path)}


def _recipe(job: MoefyJob) -> dict[str, Any]:
    source = open_model(local_model(job.model))
    check_output(job.output, source.path)
    check_has_tokenizer(source.folder)
    teacher = {"teacher": str(source.path), "ce_scale": 2.0, "ce_temp": 2.0} if job.steps else None
    return base_recipe(job, source, max(1, job.steps)) | {
        "distillation": teacher,
        "MoEfication": {
            "is_moefy": True,
            "first_FFN_module": [],
            "experts": job.experts,
            "shared": job.shared,
            "active": job.active,
            "calibration_steps": job.calibration_steps,
            "steps": job.steps,
        },
        "pruning": {
            "is_pruning": False,
            "pruned_module": matrices(source, with_hidden=False),
            "mask_method": "fine-grained",
        },
        "stages": [{"name": "moefy"}],
    }


def moefy_table(job: MoefyJob) -> str:
    """The dense model and the one with experts: parameters, those that are active per token, and held-out loss."""
    done = read_json(Path(job.output) / "run" / "moefy" / "done.json")
    source = open_model(local_model(job.model))
    dense = parameters(source.adapter.space(source.config))
    rows = [
        [job.model, dense, dense, done[DENSE_LOSS]],
        [f"{job.output}/model", done["parameters"], done["active_parameters"], done["held_out_loss"]],
    ]
    cells = [[name, human_count(all_), human_count(active), f"{loss:.4f}"] for name, all_, active, loss in rows]
    return "\n" + markdown_table(["model", "parameters", "active per token", "held-out loss"], cells) + "\n"
