"""Learned masks against random ones at equal total steps after pretraining.

    python scripts/bench/equal_total_steps.py [--seeds 0 1 2] [--folder results/equal_total_steps]

Runs the default recipe with a random baseline that gets as many steps as all mask and finetune stages together. Started
again, it skips finished stages.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from common import ROOT, publish, run_apart

from cook.base.files import read_json, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", default="results/equal_total_steps")
    parser.add_argument("--output")
    options = parser.parse_args()
    rows = [one_seed(seed, Path(options.folder).resolve() / f"seed-{seed}") for seed in options.seeds]
    median = statistics.median(row["random - learned"] for row in rows)
    publish("equal_total_steps", vars(options) | {"median gain in nats": median}, rows, options.output)


def one_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Runs the recipe in `folder`; returns the held-out losses."""
    config, scheme = read_json(ROOT / "config" / "bmcook.json"), read_json(ROOT / "config" / "l0_pruning.json")
    for section in ("coarse-grained", "fine-grained"):
        for key, value in scheme[section].items():
            if str(value).endswith(".pt"):
                scheme[section][key] = str(folder / "masks" / Path(value).name)
    pruning = [stage for stage in config["stages"] if stage["name"] not in ("pretrain", "random_baseline")]
    steps = sum(stage["training"]["steps"] for stage in pruning)
    next(s for s in config["stages"] if s["name"] == "random_baseline")["training"]["steps"] = steps
    config |= {"output_dir": str(folder), "seed": seed, "deepspeed": str(ROOT / config["deepspeed"])}
    write_json(folder / "bmcook.json", config)
    write_json(folder / "l0_pruning.json", scheme)
    run_apart(["cook/train.py", "--config", str(folder / "bmcook.json"), "--stage", "all"])
    names = {"pretrain": "dense", pruning[-1]["name"]: "learned", "random_baseline": "random"}
    losses = {word: read_json(folder / name / "done.json")["held_out_loss"] for name, word in names.items()}
    return {"seed": seed, "steps": steps, **losses, "random - learned": losses["random"] - losses["learned"]}


if __name__ == "__main__":
    main()
