"""The report of a pruning run's finished stages: a table, two figures, a JSON file and text files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cook.base.files import read_json, write_atomically, write_json
from cook.config.tasks import TaskConfig
from cook.recipe.benchmarks import task_plan as plan
from cook.recipe.benchmarks.session import write_results
from cook.recipe.benchmarks.task import TaskInfo
from cook.report.pruning_figures import plot_metric_curves, plot_sparsity_by_matrix
from cook.report.tables import MISSING, markdown_table
from cook.sparsity.spec import PatternSpec

PHASES = ("before pruning", "after pruning", "after recovery")


def write_prune_report(config: TaskConfig, info: TaskInfo, spec: PatternSpec, source: str) -> None:
    """Writes `report.md`, `results.json`, `eval_results.txt`, `sparsity.txt`, `curve.png` and `sparsity.png`.

    Args:
        config: The run.
        info: The task.
        spec: The pattern.
        source: The dense model.
    """
    root = plan.prune_folder(config)
    records = [read_json(stage.done) for stage in plan.prune_stages(config) if stage.done.is_file()]
    table = stage_table(records, info.main_metric)
    print(f"\n{table}\n", flush=True)
    last, metric = records[-1], info.main_metric
    dense = records[0]["metrics"][PHASES[0]][metric]
    plot_metric_curves(
        {when: [(100 * r["sparsity"], r["metrics"][when][metric]) for r in records] for when in PHASES[1:]},
        root / "curve.png",
        metric=f"{metric} (%)",
        title=f"{info.name}, {spec.name}",
        dense=dense,
    )
    plot_sparsity_by_matrix(
        {(m["layer"], m["role"]): m["sparsity"] for m in last["matrices"]},
        root / "sparsity.png",
        title=f"{info.name}, {spec.name}: {100 * last['sparsity']:.1f}% pruned",
    )
    write_json(root / "results.json", {"task": info.name, "pattern": spec.name, "dense": source, "stages": records})
    write_results(
        root / "eval_results.txt",
        {f"{r['asked_sparsity']:g}%, {when}": r["metrics"][when] for r in records for when in PHASES},
    )
    write_atomically(root / "sparsity.txt", "\n\n".join(_matrix_lines(record) for record in records) + "\n")
    text = f"# {info.name}, {spec.name}\n\nThe dense model: `{source}`.\n\n{table}\n\n"
    text += f"![{metric} against sparsity](curve.png)\n\n![Pruned share of each matrix](sparsity.png)\n\n"
    write_atomically(root / "report.md", text + matrix_table(last) + "\n")


def stage_table(records: Sequence[Mapping[str, Any]], metric: str) -> str:
    """All metrics of the stages before pruning, after pruning and after recovery; the main metric first."""
    names = sorted(records[0]["metrics"][PHASES[0]], key=lambda name: (name != metric, name))
    if len(names) > 4:  # SQuAD 2.0 has too many metrics for a table; all are in results.json
        names = [metric, *(name for name in names if name in ("exact", "exact_match", "best_f1"))]
    headers = ["stage", "sparsity", *(f"{name} {when}" for name in names for when in PHASES)]
    rows = []
    for record in records:
        values = [record["metrics"][when][name] for name in names for when in PHASES]
        rows.append(
            [
                f"{record['asked_sparsity']:g}%",
                f"{100 * record['sparsity']:.2f}%",
                *(f"{value:.2f}" for value in values),
            ]
        )
    return markdown_table(headers, rows)


def matrix_table(record: Mapping[str, Any]) -> str:
    """Each matrix of a stage: its sparsity, and the best possible reduction of its products."""
    rows = [
        [m["path"], f"{100 * m['sparsity']:.1f}%", f"{m['total'] / m['kept']:.2f}×" if m["kept"] else MISSING]
        for m in record["matrices"]
    ]
    return markdown_table(["matrix", "sparsity", "fewer products"], rows)


def _matrix_lines(record: Mapping[str, Any]) -> str:
    lines = [f"***** {record['asked_sparsity']:g}% *****", f"total = {100 * record['sparsity']:.4f}"]
    return "\n".join(lines + [f"{m['path']} = {100 * m['sparsity']:.4f}" for m in record["matrices"]])
