"""Mixtures of experts against structured pruning to the same active size, at the same training tokens.

    python scripts/bench/moefy.py --model models/smollm2 --calibration valid.txt --test test.txt

Measures the dense model; the model with a share of its FFN dims, chosen by learned gates (weights frozen, the dense
model as the teacher) and finetuned with the same teacher; and models with experts of which a token uses as many dims:
without training; trained for as many steps as gates and finetuning take together; and with learned gates first, whose
dims the experts prefer (`masked_dims` "route"), then trained for as many steps as the finetuning. Perplexity and speed
of all models are measured in one run, in turns. Started again, it skips finished stages.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import publish, run_apart

from cook.base.files import read_json, write_json
from cook.evaluation.loading import Entry
from cook.evaluation.measure import compare, read_texts
from cook.evaluation.settings import Settings, checked
from cook.families.source import open_model
from cook.pruning.counts import parameters
from cook.recipe.one_line import matrices


def main() -> None:
    """Makes what is missing, measures and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--calibration", required=True, help="text to train on")
    parser.add_argument("--test", required=True, help="text to measure perplexity on")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shared", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--active", type=float, default=0.5)
    parser.add_argument("--learned", action=argparse.BooleanOptionalAction, default=True, help="gates before experts")
    parser.add_argument("--mask-steps", type=int, default=50)
    parser.add_argument("--finetune-steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=2, help="per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the weights")
    parser.add_argument("--windows", type=int, help="of the test text; default: all")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--folder", default="results/moefy")
    parser.add_argument("--output")
    options = parser.parse_args()
    source = open_model(options.model)
    space = source.adapter.space(source.config)
    dims = space.of("dimff")[0].size
    steps = options.mask_steps + options.finetune_steps
    models = {"dense": (options.model, parameters(space), parameters(space))}
    kept = round(options.active * dims)
    masks = [{"name": "ffn_mask", "training": {"steps": options.mask_steps, "train_weights": False}}]
    name = f"{kept} of {dims} dims, {steps} steps"
    finetune = {"name": "ffn_finetune", "training": {"steps": options.finetune_steps}}
    folder, done = run(options, name, [*masks, finetune], {"pruning": {"is_pruning": True}}, kept)
    models[name] = (folder, done["parameters"], done["parameters"])
    for shared in options.shared:
        experts = {"is_moefy": True, "experts": options.experts, "shared": shared, "active": options.active}
        label = f"{options.experts} experts, {shared} shared"
        for trained in (0, steps):
            name, section = f"{label}, {trained} steps", {"MoEfication": experts | {"steps": trained}}
            folder, done = run(options, name, [{"name": "moefy"}], section)
            models[name] = (folder, done["parameters"], done["active_parameters"])
        if not options.learned:
            continue
        section = {
            "pruning": {"is_pruning": True},
            "MoEfication": experts | {"masked_dims": "route", "steps": options.finetune_steps},
        }
        name = f"{label}, learned dims, {steps} steps"
        folder, done = run(options, name, [*masks, {"name": "moefy"}], section, kept)
        models[name] = (str(place(options, name) / "moefy/model"), done["parameters"], done["active_parameters"])
        if "auto_map" not in read_json(Path(folder) / "config.json"):  # the same weights in a class of transformers
            models[f"{name}, stock class"] = (folder, done["parameters"], done["active_parameters"])
    publish("moefy", settings_of(options), measured(options, models), options.output)


def scheme(options: argparse.Namespace, folder: Path, kept: int) -> dict[str, Any]:
    """The pruning scheme that keeps `kept` dims in every block."""
    source, masks = open_model(options.model), folder / "masks"
    space = source.adapter.space(source.config)
    heads, dims = (space.of(kind)[0] for kind in ("heads", "dimff"))
    return {
        "fine-grained": {
            "train_mask": True,
            "num_heads": heads.size * heads.members,
            "target_num_heads": heads.size * heads.members,
            "dim_ff": dims.size,
            "target_dimff": kept,
            "heads_mask": str(masks / "heads.pt"),
            "dimff_mask": str(masks / "dimff.pt"),
            "prune_mode": "ffn",
        }
    }


def place(options: argparse.Namespace, name: str) -> Path:
    return Path(options.folder).resolve() / name.replace(", ", "-").replace(" ", "-")


def run(
    options: argparse.Namespace,
    name: str,
    stages: list[dict[str, Any]],
    changes: dict[str, Any],
    kept: int | None = None,
    *,
    export: bool = True,
) -> tuple[str, dict[str, Any]]:
    """Runs the stages and exports the model; returns its folder and the record of the last stage."""
    folder, source = place(options, name), open_model(options.model)
    model = str(Path(options.model).resolve())
    config: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"type": "hf", "path": model},
        "tokenizer": {"type": "hf", "path": model, "vocab_size": source.config["vocab_size"]},
        "data": {
            "type": "text",
            "paths": [str(Path(options.calibration).resolve())],
            "held_out": 0.05,
            "max_length": options.length,
            "cache_dir": str(folder.parent / "data"),
        },
        "training": {
            "steps": 1,
            "train_batch_size": options.rows,
            "micro_batch_size": options.rows,
            "learning_rate": options.learning_rate,
            "warmup": 0.1,
            "eval_rows": 16,
        },
        "deepspeed": {"zero_optimization": {"stage": 0}},
        "distillation": {"teacher": model, "ce_scale": 2.0, "ce_temp": 2.0},
        "logging": {"tensorboard": False},
        "pruning": {
            "is_pruning": False,
            "pruned_module": matrices(source, with_hidden=False),
            "mask_method": "fine-grained",
        },
        "stages": stages,
    }
    for section, values in changes.items():
        config[section] = config.get(section, {}) | values
    write_json(folder / "bmcook.json", config)
    write_json(folder / "l0_pruning.json", {} if kept is None else scheme(options, folder, kept))
    run_apart(["cook/train.py", "--config", str(folder / "bmcook.json"), "--stage", "all"])
    small = folder / "small"
    if export:
        run_apart(["do_prune.py", "--config", str(folder / "bmcook.json"), "--output", str(small), "--verify"])
    return str(small), read_json(folder / str(stages[-1]["name"]) / "done.json")


def measured(options: argparse.Namespace, models: dict[str, tuple[str, int, int]]) -> list[dict[str, Any]]:
    """A row per model."""
    settings = checked(
        Settings(
            window=options.length,
            max_windows=options.windows,
            prompt_tokens=options.prompt_tokens,
            dtype="float32",
            trust_remote_code=True,
        )
    )
    entries = [Entry(name=name, folder=folder) for name, (folder, _, _) in models.items()]
    found = compare(entries, read_texts([options.test]), settings, files=[options.test])
    return [
        {
            "model": name,
            "parameters": total,
            "active per token": active,
            "perplexity": record["perplexity"],
            "prefill tokens/s": record["prefill_tokens_per_second"],
            "decode tokens/s": record["decode_tokens_per_second"],
        }
        for (name, (_, total, active)), record in zip(models.items(), found["models"], strict=True)
    ]


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    hidden = ("folder", "output", "calibration", "test")
    return {key: value for key, value in vars(options).items() if key not in hidden} | {
        "model": Path(options.model).name
    }


if __name__ == "__main__":
    main()
