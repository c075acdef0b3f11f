"""Was pruning worth its tokens? The default run's small model against others of its size.

    bash scripts/prune_cpm_ant.sh
    python scripts/bench/same_size.py [--config config/bmcook.json]

Reads what the finished run has measured (dense, learned masks, random masks with the finetuning that the learned ones
had) and trains the same small shape twice from fresh weights, with the run's own pretraining rate and one cosine over
the whole: on as many tokens as pruning took (mask learning and finetuning; what one has to choose between who has a
pretrained model), and on as many as pretraining and pruning took together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import ROOT, publish, run_apart

from cook.base.errors import UserError, run_entry
from cook.base.files import read_json
from cook.config.load import load_config
from cook.export.model_folder import write_model_folder
from cook.families.registry import by_config
from cook.recipe.plan import recipe

BAR = {"random masks": 0.10, "from scratch, pruning's tokens": 0.0, "from scratch, all tokens": 0.0}
"""Nats by which the learned masks are to be better."""


def main() -> None:
    """Parses, trains, publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/bmcook.json")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="as of cook/train.py")
    parser.add_argument("--min-rate", type=float, default=0.05, help="from scratch: the last rate over the highest")
    parser.add_argument("--output")
    options = parser.parse_args()
    config = load_config(options.config, options.settings)
    run = Path(config.output_dir).resolve()
    done = {stage.name: read_json(stage.done) for stage in recipe(config) if stage.done.exists()}
    small = run / "pruned" / "config.json"
    if "ffn_finetune" not in done or not small.exists():
        raise UserError(f"{run}: no finished run", remedy="bash scripts/prune_cpm_ant.sh")
    learned = {name: entry for name, entry in done.items() if name != "random_baseline"}
    steps = sum(entry["steps"] for entry in learned.values())
    pruning_steps = steps - done["pretrain"]["steps"]
    done["from_scratch"] = from_scratch(options, run / "from_scratch", read_json(small), pruning_steps)
    done["from_scratch_longer"] = from_scratch(options, run / "from_scratch_longer", read_json(small), steps)
    loss = {name: entry["held_out_loss"] for name, entry in done.items()}
    shown = {
        "pretrain": "dense",
        "ffn_finetune": "learned masks",
        "random_baseline": "random masks",
        "from_scratch": "from scratch, pruning's tokens",
        "from_scratch_longer": "from scratch, all tokens",
    }
    taken = {
        "pretrain": done["pretrain"]["steps"],
        "ffn_finetune": steps,
        "from_scratch": pruning_steps,
        "from_scratch_longer": steps,
        "random_baseline": done["pretrain"]["steps"] + done.get("random_baseline", {"steps": 0})["steps"],
    }
    rows = [
        {
            "model": label,
            "steps in all": taken[name],
            "parameters": done[name]["parameters"],
            "held-out loss": loss[name],
            "above the dense model": loss[name] - loss["pretrain"],
            "above learned masks": loss[name] - loss["ffn_finetune"],
            "bar": BAR.get(label),
        }
        for name, label in shown.items()
        if name in done
    ]
    settings = {"stages": {name: entry["steps"] for name, entry in done.items()}, "seed": config.seed}
    publish("same_size", settings, rows, options.output)


def from_scratch(options: argparse.Namespace, folder: Path, shape: dict[str, Any], steps: int) -> dict[str, Any]:
    """Trains the small shape from fresh weights in a folder of its own; what its stage leaves."""
    adapter = by_config(shape)
    native, _ = adapter.read(shape, {})
    torch.manual_seed(0)
    fresh = folder / "fresh"
    write_model_folder(fresh, adapter, native, iter(adapter.build(native).state_dict().items()))
    written = json.loads(Path(options.config).read_text())
    pretraining = next(entry for entry in written["stages"] if entry["name"] == "pretrain")["training"]
    scheme = json.loads((Path(options.config).parent / written["pruning"]["l0_pruning"]).read_text())
    scheme.pop("fine-grained", None)  # its sizes are those of the dense model
    (folder / "l0_pruning.json").write_text(json.dumps(scheme))
    changed = {"steps": steps, "min_learning_rate": options.min_rate}
    written |= {
        "output_dir": str(folder),
        "model": {"type": written["model"]["type"], "path": str(fresh)},
        "pruning": written["pruning"] | {"is_pruning": False, "l0_pruning": "l0_pruning.json"},
        "stages": [{"name": "pretrain", "training": pretraining | changed}],
    }
    if isinstance(written["deepspeed"], str):
        written["deepspeed"] = str((ROOT / written["deepspeed"]).resolve())
    path = folder / "bmcook.json"
    path.write_text(json.dumps(written, indent=2))
    given = [f"--set={setting}" for setting in options.settings if not setting.startswith("output_dir=")]
    run_apart([str(ROOT / "cook" / "train.py"), "--config", str(path), "--stage", "all", *given])
    return read_json(folder / "pretrain" / "done.json")


if __name__ == "__main__":
    run_entry(main)
