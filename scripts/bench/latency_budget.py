"""Whether `cook prune --keep latency_ms=` gives a model that takes as long as it was asked to.

    python scripts/bench/latency_budget.py --model SMOLLM2_FOLDER --calibration valid.txt --units "" all

The blocks are measured once, as `cook profile` does it. For each share of the whole model's time, one model per set of
units is pruned; then it and the whole model are timed in turns, so that a machine that has become slower meanwhile
changes both. Run it while nothing else runs on the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import ROOT, publish

from cook.base.files import write_json
from cook.evaluation.profile import measure_block_times
from cook.evaluation.settings import ProfileSettings, device_of
from cook.evaluation.speed import median_seconds
from cook.families.source import load_model, open_model, placed
from cook.pruning.block_times import read_block_times
from cook.recipe.one_line_scheme import TIMES


def seconds(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds per forward pass of the whole model and of a small one, in turns."""
    settings = ProfileSettings(length=options.length)
    device = torch.device(device_of(settings))
    ids = torch.arange(options.length, device=device)[None] % 256
    models = {}
    for name, path in (("whole", Path(options.model)), ("small", folder)):
        models[name] = placed(load_model(open_model(path)), device, torch.float32).eval()
    passes = {n: torch.no_grad()(lambda model=m: model(input_ids=ids, use_cache=False)) for n, m in models.items()}
    return median_seconds(passes, device, repeats=options.repeats)


def main() -> None:
    options = parse()
    work, rows = Path(options.work), list[dict[str, Any]]()
    work.mkdir(parents=True, exist_ok=True)
    path = work / TIMES
    if not path.exists():
        settings = ProfileSettings(length=options.length)
        write_json(path, measure_block_times(open_model(options.model), settings, on_point=print).as_json())
    times = read_block_times(path)
    for units in options.units:
        for share in options.shares:
            budget, output = share * times.whole, work / f"{units.replace(',', '_') or 'default'}_{share:g}"
            write_json(output / TIMES, times.as_json())  # where `cook prune` looks before it measures
            command = [sys.executable, "-m", "cook", "prune", options.model, "--data", options.calibration]
            command += ["--keep", f"latency_ms={budget:.4f}", "--steps", str(options.steps), "--output", str(output)]
            command += ["--max-length", str(options.length)]
            command += [word for unit in units.split(",") if unit for word in ("--units", unit)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                rows.append({"units": units or "heads,dims", "share": share, "note": done.stderr.strip()[-300:]})
                continue
            found = seconds(options, output / "model")
            got = found["small"] / found["whole"]
            rows.append(
                {
                    "units": units or "heads,dims",
                    "share": share,
                    "budget, ms": budget,
                    "whole, ms": 1000 * found["whole"],
                    "small, ms": 1000 * found["small"],
                    "measured of the whole": got,
                    "off": got / share - 1,
                    "within 5%": abs(got / share - 1) <= 0.05,
                }
            )
            print(rows[-1], flush=True)
    settings = {name: getattr(options, name) for name in ("units", "shares", "steps", "length", "repeats")}
    publish("latency_budget", settings, rows, options.output)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--calibration", required=True, help="a text file")
    parser.add_argument("--units", nargs="+", default=["", "all"], help="comma-separated names for `--units`")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--work", default="/tmp/cook_latency")
    parser.add_argument("--output", help="the JSON; default: results/bench/latency_budget.json")
    options = parser.parse_args()
    for name in ("model", "calibration", "work"):
        setattr(options, name, str(Path(getattr(options, name)).resolve()))
    return options


if __name__ == "__main__":
    main()
