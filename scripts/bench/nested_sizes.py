"""One run of several nested sizes against one run per size, at the steps of one run each.

    python scripts/bench/nested_sizes.py [--seeds 0] [--sizes 0.5 0.3 0.15] [--folder results/nested_sizes]

Pretrains the default run's CPM-Ant, once per seed. From its weights, `joint_mask` and `joint_finetune` make all sizes
in one run, and each size in a run of its own with as many steps: n sizes cost one n-th. With weights `fixed`, masks
alone are learned, with the dense model as the teacher. Started again, it skips finished stages.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import ROOT, publish, run_apart

from cook.base.files import read_json, write_json

BAR = 0.03
"""Nats by which a size of the common run may be worse than its own run."""


def main() -> None:
    """Trains what is missing, and publishes the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.5, 0.3, 0.15], help="in descending order")
    parser.add_argument("--mask-steps", type=int, default=60)
    parser.add_argument("--finetune-steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=8, help="per step")
    parser.add_argument("--learning-rate", type=float, default=0.005, help="of the weights")
    parser.add_argument("--weights", nargs="+", choices=["trained", "fixed"], default=["trained", "fixed"])
    parser.add_argument("--folder", default="results/nested_sizes")
    parser.add_argument("--output")
    options = parser.parse_args()
    folders = {seed: Path(options.folder).resolve() / f"seed-{seed}" for seed in options.seeds}
    rows = [
        row
        for seed, folder in folders.items()
        for weights in options.weights
        for row in compared(options, seed, weights, folder)
    ]
    settings = {name: value for name, value in vars(options).items() if name not in ("folder", "output")}
    publish("nested_sizes", settings | {"bar in nats": BAR}, rows, options.output)


def compared(options: argparse.Namespace, seed: int, weights: str, folder: Path) -> list[dict[str, Any]]:
    """A row per size, of one seed."""
    dense = run(folder / "dense", seed, None, {"pretrain": {}})
    start = folder / "dense" / "pretrain" / "model"
    stages: dict[str, dict[str, Any]] = {"joint_mask": {"steps": options.mask_steps}}
    if weights == "trained":
        stages["joint_finetune"] = {"steps": options.finetune_steps}
    else:
        stages["joint_mask"]["train_weights"] = False
    for settings in stages.values():
        settings |= {"train_batch_size": options.rows, "micro_batch_size": options.rows}
        settings |= {"learning_rate": options.learning_rate}
    together = run(folder / f"{weights}-nested", seed, start, stages, options.sizes)
    rows = []
    for size, model in zip(options.sizes, together["sizes"], strict=True):
        apart = run(folder / f"{weights}-{size:g}", seed, start, stages, size)
        rows.append(
            {
                "seed": seed,
                "weights": weights,
                "share kept": size,
                "parameters": model["parameters"],
                "dense": dense["held_out_loss"],
                "nested": model["held_out_loss"],
                "own run": apart["held_out_loss"],
                "nested - own": model["held_out_loss"] - apart["held_out_loss"],
                "minutes, nested": together["minutes"],
                "minutes, own": apart["minutes"],
            }
        )
    return rows


def run(folder: Path, seed: int, start: Path | None, stages: dict[str, dict[str, Any]], target: Any = 0.5) -> Any:
    """Runs the stages in `folder`; returns the record of the last one, with the minutes of all."""
    config, scheme = read_json(ROOT / "config" / "bmcook.json"), read_json(ROOT / "config" / "l0_pruning.json")
    entries = {entry["name"]: entry["training"] for entry in config["stages"]}
    for section in ("coarse-grained", "fine-grained"):
        for key, value in scheme[section].items():
            if str(value).endswith(".pt"):
                scheme[section][key] = str(folder / "masks" / Path(value).name)
    scheme["joint"] = {"train_mask": True, "scope": "global", "target_params": target}
    steady = {"schedule": "constant"}
    config |= {
        "output_dir": str(folder),
        "seed": seed,
        "deepspeed": str(ROOT / config["deepspeed"]),
        "stages": [
            {"name": name, "training": entries.get(name, steady if name == "joint_mask" else {}) | changes}
            for name, changes in stages.items()
        ],
    }
    config["training"] |= {"log_gates": False, "save_every": 0}
    config["pruning"] |= {"mask_method": "joint"}
    if start:
        config["model"] = {"type": "cpm_ant", "path": str(start)}
        config["tokenizer"]["path"] = str(next(start.glob("*.model")))
        config["data"]["cache_dir"] = str(folder.parent / "data")
    if start and not stages["joint_mask"].get("train_weights", True):
        config["distillation"] = {"teacher": "self", "ce_scale": 2.0, "ce_temp": 2.0}
    write_json(folder / "bmcook.json", config)
    write_json(folder / "l0_pruning.json", scheme)
    run_apart(["cook/train.py", "--config", str(folder / "bmcook.json"), "--stage", "all"])
    records = [read_json(folder / name / "done.json") for name in stages]
    return records[-1] | {"minutes": round(sum(record["seconds"] for record in records) / 60, 2)}


if __name__ == "__main__":
    main()
