"""The report of a run: a table of all its models, their speeds measured side by side, and the figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from cook.base.batches import Batch
from cook.base.device import accelerator, default_device
from cook.base.errors import UserError
from cook.config.kinds import NAMES
from cook.config.types import RunConfig
from cook.evaluation.speed import LARGEST_TIMED, forward_seconds
from cook.export.pruned_folder import reshaped_source
from cook.families.source import load_model, open_model
from cook.pruning.counts import parameters
from cook.pruning.family import ModelSource
from cook.pruning.mask_set import kept_counts
from cook.pruning.spending import Spent
from cook.recipe.kept_structure import as_lists, masks_of_structure
from cook.recipe.plan import Stage
from cook.recipe.summary import done_record, finished_stages, ladder_row, models_of, sample_batches, spent_by
from cook.report.documents import Figure, write_report
from cook.report.events import LOG_NAME, read_log
from cook.report.figures import plot_losses, plot_sparsity
from cook.report.pruning_figures import plot_spending, plot_structure
from cook.report.tables import human_count, ladder_table, markdown_table


def report_run(config: RunConfig, folder: Path, remarks: Sequence[str] = ()) -> None:
    """Writes `folder/report.md` with its figures and prints the table.

    Args:
        config: The run's settings.
        folder: The folder to write.
        remarks: Sentences that the report ends with.

    Raises:
        UserError: no stage has finished yet.
    """
    stages = finished_stages(config, baseline=True)
    if not stages:
        raise UserError(f"no stage has finished under {config.output_dir}", remedy="train first")
    # A mask stage's model is only the input of its finetuning: the table shows the models that a user would keep.
    shown = [s for s in stages if not s.learns] or stages
    models = [(stage, number) for stage in shown for number in range(len(models_of(stage)))]
    speeds = _speeds(config, models)
    rows = [ladder_row(stage, speeds.get(_name(stage, number)), number) for stage, number in models]
    folder.mkdir(parents=True, exist_ok=True)
    last = [stage for stage in stages if not stage.is_random_baseline and stage.pattern_mask is None]
    spent = spent_by(last[-1]) if last else []
    figures = _figures(stages, folder, spent)
    notes = [*_notes(stages), *remarks]
    taken = [_spending_table(spent)] if any(row.parameters for row in spent) else []
    path = write_report(folder, rows, figures, title=f"Report of {config.output_dir}", notes=[*notes, *taken])
    print("\n" + "\n\n".join([ladder_table(rows), *taken]) + "\n")
    for note in notes:
        print(note)
    print(f"report: {path}")


def _name(stage: Stage, number: int) -> str:
    return f"{stage.name} {number}"


def _speeds(config: RunConfig, shown: list[tuple[Stage, int]]) -> dict[str, float]:
    """Forward tokens/s of each stage's reshaped models, measured in turns."""
    if max(models_of(stage)[number]["parameters"] for stage, number in shown) > LARGEST_TIMED:
        return {}
    device = default_device()
    models: dict[str, torch.nn.Module] = {}
    batches: list[Batch] = []
    for stage, number in shown:
        source = open_model(stage.folder / "model")
        batches = batches or sample_batches(config, source, rows=8)[0]
        models[_name(stage, number)] = _small_model(stage, number, source).to(device)
    tokens = sum(batch["targets"].numel() for batch in batches)
    return {name: tokens / seconds for name, seconds in forward_seconds(models, batches, device).items()}


def _small_model(stage: Stage, number: int, source: ModelSource) -> torch.nn.Module:
    if stage.is_moefy:
        return load_model(source)
    space = source.adapter.space(source.config, done_record(stage)["head_unit"])
    masks = masks_of_structure(space, models_of(stage)[number]["structure"])
    model = load_model(reshaped_source(source, space, masks))
    assert sum(p.numel() for p in model.parameters()) == parameters(space, kept_counts(masks))
    return model


def _spending_table(spent: list[Spent]) -> str:
    total = sum(row.parameters for row in spent)
    rows = [
        [
            NAMES[row.kind].short,
            f"{row.before:,}",
            f"{row.after:,}",
            f"{row.parameters:,}",
            f"{row.parameters / total:.0%}",
        ]
        for row in spent
        if row.parameters
    ]
    return markdown_table(["taken from", "before", "after", "parameters", "share"], rows)


def _figures(stages: list[Stage], folder: Path, spent: list[Spent]) -> list[Figure]:
    logs = {stage.name: read_log(stage.folder / LOG_NAME) for stage in stages}
    main = [(stage.name, logs[stage.name]) for stage in stages if not stage.is_random_baseline]
    side = [(stage.name, logs[stage.name]) for stage in stages if stage.is_random_baseline]
    figures = [
        Figure(
            caption="Loss over all stages; the numbers are held-out losses at the end of each stage.",
            path=plot_losses(main, folder / "losses.png", side),
        )
    ]
    learned = [(stage.name, logs[stage.name]) for stage in stages if stage.learns]
    if learned:
        caption = "Expected sparsity and its target, and the multipliers λ (loss per unit of sparsity)."
        figures.append(Figure(caption=caption, path=plot_sparsity(learned, folder / "sparsity.png")))
    last = [stage for stage in stages if not stage.is_random_baseline][-1:]
    for stage in last:
        structure = as_lists(done_record(stage)["structure"])
        caption = "The kept structure: heads and FFN dimensions of each layer's blocks."
        figures.append(Figure(caption=caption, path=plot_structure(structure, folder / "structure.png")))
        if any(row.parameters for row in spent):
            caption = "The parameters that went with each kind of units, all of them removed together and evenly."
            bars = [(NAMES[row.kind].short, row.before, row.after, row.parameters) for row in spent]
            figures.append(Figure(caption=caption, path=plot_spending(bars, folder / "spending.png")))
    return figures


def _notes(stages: list[Stage]) -> list[str]:
    records = {stage.name: done_record(stage) for stage in stages}
    seconds = sum(record["seconds"] for record in records.values())
    notes = [
        f"{len(stages)} stages, {seconds / 60:.1f} minutes of training; speeds are forward passes of the reshaped "
        f"models, measured in turns on {os.cpu_count()} cores" + (" and a GPU." if accelerator() else ".")
    ]
    baseline = records.get("random_baseline")
    after = [stage for stage in stages if stage.name not in ("pretrain", "random_baseline")]
    if baseline and after:
        steps = sum(records[stage.name]["steps"] for stage in after)
        notes.append(
            f"Random masks: as many blocks, heads and dims, chosen at random; {baseline['steps']} steps of finetuning "
            f"from the dense model. The learned masks took {steps} steps in all, mask training included."
        )
    if active := records.get("moefy", {}).get("active_parameters"):
        notes.append(f"Of the mixture of experts, {human_count(active)} parameters are active per token.")
    return notes
