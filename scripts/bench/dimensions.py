"""What a budget is best spent on: FFN dims alone, heads too, all dimensions of the model, the vocabulary too.

    python scripts/bench/dimensions.py --model SMOLLM2_FOLDER --calibration valid.txt \
        --text wikitext2=test.txt --text imdb=reviews.txt

Every cell removes the same share of all parameters, embeddings counted, with the weights frozen, by `cook prune` and
`cook compare`; the text of the calibration is in the domain of the first text. With the vocabulary, tokens that are
rare in `--vocabulary-text` (`cook data vocabulary`) go first, and the budget of the other units is what is left; losses
are per byte then. A budget that cannot be reached is noted. A run that was stopped resumes (`--work`).

`--speed` times the models of all cells, and the whole model, in turns; run it while nothing else runs on the machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from common import ROOT, publish

from cook.base.files import read_json, write_json

UNITS = {
    "dims": ["--units", "dims"],
    "heads and dims": ["--units", "heads", "--units", "dims"],
    "all but blocks": ["--units", "all", "--pin", "blocks"],
    "all dimensions": ["--units", "all"],
    "all but blocks, and vocabulary": ["--units", "all", "--pin", "blocks"],
    "all, and vocabulary": ["--units", "all"],
}
"""The variants, and their options of `cook prune`."""
SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")


def cook(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cook", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def checked(*arguments: str) -> None:
    done = cook(*arguments)
    if done.returncode:
        sys.exit(f"cook {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def folder_name(variant: str, removed: float, steps: int) -> str:
    """The folder of a cell, below the work folder."""
    return f"{variant.replace(', ', '_').replace(' ', '_')}_{removed:g}_{steps}"


def counted(options: argparse.Namespace) -> Path:
    """The file with the tokens that are not rare in the texts for the vocabulary."""
    tokens = Path(options.work) / f"vocabulary_{options.min_count}.json"
    if not tokens.exists():
        how = ("--tokenizer", options.model, "--output", str(tokens), "--min-count", str(options.min_count))
        checked("data", "vocabulary", *options.vocabulary_text, "--format", "text", *how)
    return tokens


def pruned(options: argparse.Namespace, variant: str, removed: float, steps: int) -> tuple[Path | None, str]:
    """The folder of a cell's small model, or None and why there is none."""
    output = Path(options.work) / folder_name(variant, removed, steps)
    if not (output / "report").exists():
        done = cook(
            *("prune", options.model, "--data", options.calibration, "--output", str(output)),
            *("--keep", f"params={1 - removed:.6f}", "--steps", str(steps), "--seed", str(options.seed)),
            *("--max-length", str(options.length), "--batch-size", str(options.rows)),
            *UNITS[variant],
            *(("--vocabulary", str(counted(options))) if variant.endswith("vocabulary") else ()),
        )
        if done.returncode == 2:
            return None, done.stderr.strip()[-300:]
        if done.returncode:
            sys.exit(f"{output.name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return output, ""


def compared(options: argparse.Namespace, models: Mapping[str, Path], text: str, *more: str) -> list[dict[str, Any]]:
    """The records of `cook compare` on one text, one per model."""
    aside = Path(options.work) / "compared"
    shutil.rmtree(aside, ignore_errors=True)
    named = [f"{name}={folder}" for name, folder in models.items()]
    how = ("--trust-remote-code", "--window", str(options.length), "--output", str(aside))
    checked("compare", *named, "--data", text, *how, *more)
    records: list[dict[str, Any]] = read_json(aside / "comparison.json")["models"]
    return records


def losses(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Losses on every text, and the number of parameters."""
    found: dict[str, Any] = {}
    for name, text in options.texts:
        [record] = compared(options, {"model": folder}, text, "--no-speed", "--max-windows", str(options.windows))
        found |= {f"bits per byte, {name}": record["bits_per_byte"], f"perplexity, {name}": record["perplexity"]}
        found["parameters"] = record["parameters"]
    return found


def beside_whole(options: argparse.Namespace, cell: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """A row of the result. Perplexities are per token of the whole vocabulary, which is what can be compared."""
    if "parameters" not in cell:
        return cell
    row = cell | {"of the model": cell["parameters"] / whole["parameters"]}
    for name, _ in options.texts:
        bits = f"bits per byte, {name}"
        row[f"perplexity, {name}"] = whole[f"perplexity, {name}"] ** (cell[bits] / whole[bits])
    return row


def add_speeds(options: argparse.Namespace, cells: Sequence[dict[str, Any]]) -> None:
    """Adds speed and memory of each small model, as multiples of the whole model's, measured in turns."""
    timed = [cell for cell in cells if "parameters" in cell]
    models = {"whole": Path(options.model)}
    for cell in timed:
        name = folder_name(cell["units"], cell["removed"], cell["steps"])
        models[name] = Path(options.work) / name / "model"
    how = ("--max-windows", "1", "--repeats", str(options.repeats))
    _, *records = compared(options, models, options.texts[0][1], *how)
    for cell, record in zip(timed, records, strict=True):
        cell |= {f"ratio, {key}": record["ratio_to_first"].get(key) for key in SPEEDS}


def main() -> None:
    options = parse()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    path = work / "cells.json"
    done: dict[str, Any] = read_json(path) if path.exists() else {}
    if "whole" not in done:
        done["whole"] = losses(options, Path(options.model))
    whole, cells = done["whole"], list[dict[str, Any]]()
    for steps, removed, variant in product(options.steps, options.removed, options.variants):
        key = json.dumps([variant, removed, steps, options.seed])
        if key not in done:
            folder, why = pruned(options, variant, removed, steps)
            done[key] = {"units": variant, "removed": removed, "steps": steps, "note": why}
            if folder:
                done[key] |= losses(options, folder / "model")
                shutil.rmtree(folder / "run", ignore_errors=True)  # the whole model, once per stage
            write_json(path, done)
        cells.append(done[key])
        print(done[key], flush=True)
    if options.speed:
        add_speeds(options, cells)
        write_json(path, done)
    local = ("model", "work", "calibration", "vocabulary_text", "text", "texts", "output")
    settings = {name: value for name, value in vars(options).items() if name not in local}
    settings |= {"texts": [name for name, _ in options.texts], "whole model": whole}
    publish("dimensions", settings, [beside_whole(options, cell, whole) for cell in cells], options.output)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--calibration", required=True, help="a text file")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="in the domain first")
    parser.add_argument("--work", default="/tmp/cook_dimensions", help="checkpoints and finished cells")
    parser.add_argument("--removed", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--variants", nargs="+", choices=list(UNITS), default=list(UNITS))
    parser.add_argument("--vocabulary-text", nargs="+", help="files or folders of text; default: the calibration")
    parser.add_argument("--min-count", type=int, default=1, help="tokens that are rarer there go")
    parser.add_argument("--speed", action="store_true", help="time the models too")
    parser.add_argument("--windows", type=int, default=32, help="of each text")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="the JSON; default: results/bench/dimensions.json")
    options = parser.parse_args()
    for name in ("model", "calibration", "work"):
        setattr(options, name, str(Path(getattr(options, name)).resolve()))
    options.vocabulary_text = [str(Path(file).resolve()) for file in options.vocabulary_text or [options.calibration]]
    options.texts = [(name, str(Path(file).resolve())) for name, file in (text.split("=", 1) for text in options.text)]
    return options


if __name__ == "__main__":
    main()
