"""What a budget is best spent on: FFN dims alone, heads too, all dimensions of the model, the vocabulary too.

    python scripts/bench/dimensions.py --model SMOLLM2_FOLDER --calibration valid.txt \
        --text wikitext2=test.txt --text imdb=reviews.txt

Every cell removes the same share of all parameters, embeddings counted, with the weights frozen, by `cook prune` and
`cook compare`; the text of the calibration is in the domain of the first text. With the vocabulary, tokens that the
calibration text lacks go first (`cook data vocabulary`, `cook reshape`), and the budget of the other units is what is
left; losses are per byte then. A budget that cannot be reached is noted. A run that was stopped resumes
(`--work`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT, publish

from cook.base.files import read_json, write_json
from cook.families.source import open_model
from cook.pruning.counts import parameters

UNITS = {
    "dims": ["--units", "dims"],
    "heads and dims": ["--units", "heads", "--units", "dims"],
    "all but blocks": ["--units", "all", "--pin", "blocks"],
    "all dimensions": ["--units", "all"],
    "all but blocks, and vocabulary": ["--units", "all", "--pin", "blocks"],
    "all, and vocabulary": ["--units", "all"],
}
"""The variants, and their options of `cook prune`."""


def cook(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cook", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def checked(*arguments: str) -> None:
    done = cook(*arguments)
    if done.returncode:
        sys.exit(f"cook {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def count(folder: Path) -> int:
    """Parameters of a model folder, tied weights once."""
    source = open_model(folder)
    return parameters(source.adapter.space(source.config))


def with_less_vocabulary(options: argparse.Namespace) -> Path:
    """The model without the tokens that the calibration text lacks."""
    folder = Path(options.work) / "vocabulary"
    if not (folder / "model").exists():
        tokens = folder / "tokens.json"
        tokens.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        kind = ["--format", "text"] if options.calibration.endswith(".txt") else []
        checked("data", "vocabulary", options.calibration, "--tokenizer", options.model, "--output", str(tokens), *kind)
        checked("reshape", "--model", options.model, "--vocabulary", str(tokens), "--output", str(folder / "model"))
    return folder / "model"


def pruned(options: argparse.Namespace, variant: str, removed: float, steps: int) -> tuple[Path | None, str]:
    """The folder of a cell's small model, or None and why there is none."""
    model, keep = Path(options.model), 1 - removed
    if variant.endswith("vocabulary"):
        before, model = count(model), with_less_vocabulary(options)
        keep *= before / count(model)
        if keep >= 1:
            return None, "the vocabulary alone is larger than what is to go"
    name = f"{variant.replace(', ', '_').replace(' ', '_')}_{removed:g}_{steps}"
    output = Path(options.work) / name
    if not (output / "report").exists():
        done = cook(
            *("prune", str(model), "--data", options.calibration, "--output", str(output)),
            *("--keep", f"params={keep:.6f}", "--steps", str(steps), "--seed", str(options.seed)),
            *("--max-length", str(options.length), "--batch-size", str(options.rows)),
            *UNITS[variant],
        )
        if done.returncode == 2:
            return None, done.stderr.strip()[-300:]
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return output, ""


def measured(options: argparse.Namespace, folder: Path, dense_bits: dict[str, float]) -> dict[str, Any]:
    """Losses on every text; parameters, speed and memory beside the whole model, in turns.

    The losses of the whole model on the other texts are measured once, and kept in `dense_bits`.
    """
    found: dict[str, Any] = {}
    for number, (name, text) in enumerate(options.texts):
        aside = folder / f"compared_{name}"
        speed = [] if number == 0 else ["--no-speed"]
        whole = [] if number and name in dense_bits else [f"dense={options.model}"]
        checked(
            *("compare", *whole, f"small={folder / 'model'}", "--data", text, *speed),
            *("--trust-remote-code", "--max-windows", str(options.windows), "--window", str(options.length)),
            *("--output", str(aside), "--repeats", str(options.repeats)),
        )
        comparison = read_json(aside / "comparison.json")
        *dense, small = comparison["models"]
        if dense:
            per_token = comparison["same_tokens"]
            dense_bits[name] = dense[0]["bits_per_byte"]
        found |= {f"perplexity, {name}": small["perplexity"] if per_token else None}
        found |= {f"bits per byte, {name}": small["bits_per_byte"], f"dense, {name}": dense_bits[name]}
        if number == 0:
            found |= {"parameters": small["parameters"], "of the model": small["parameters"] / dense[0]["parameters"]}
            for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes"):
                found |= {key: small.get(key), f"ratio, {key}": small["ratio_to_first"].get(key)}
    return found


def main() -> None:
    options = parse()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    path = work / "cells.json"
    done: dict[str, Any] = read_json(path) if path.exists() else {}
    dense_bits = {
        name: cell[f"dense, {name}"]
        for cell in done.values()
        for name, _ in options.texts
        if cell.get(f"dense, {name}")
    }
    for steps in options.steps:
        for removed in options.removed:
            for variant in options.variants:
                key = json.dumps([variant, removed, steps, options.seed])
                if key in done:
                    continue
                folder, why = pruned(options, variant, removed, steps)
                cell = {"units": variant, "removed": removed, "steps": steps, "note": why}
                done[key] = cell | (measured(options, folder, dense_bits) if folder else {})
                write_json(path, done)
                print(done[key], flush=True)
                if folder:
                    shutil.rmtree(folder / "run", ignore_errors=True)  # the whole model, once per stage
                    shutil.rmtree(folder / "model", ignore_errors=True)
    local = ("model", "work", "calibration", "text", "texts", "output")
    settings = {name: value for name, value in vars(options).items() if name not in local}
    settings["texts"] = [name for name, _ in options.texts]
    publish("dimensions", settings, [*done.values()], options.output)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--calibration", required=True, help="a text file")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="in the domain first")
    parser.add_argument("--work", default="/tmp/cook_dimensions", help="checkpoints and finished cells")
    parser.add_argument("--removed", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--variants", nargs="+", choices=list(UNITS), default=list(UNITS))
    parser.add_argument("--windows", type=int, default=32, help="of each text")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="the JSON; default: results/bench/dimensions.json")
    options = parser.parse_args()
    for name in ("model", "calibration", "work"):
        setattr(options, name, str(Path(getattr(options, name)).resolve()))
    options.texts = [(name, str(Path(file).resolve())) for name, file in (text.split("=", 1) for text in options.text)]
    return options


if __name__ == "__main__":
    main()
