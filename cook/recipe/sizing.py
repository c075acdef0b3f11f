"""Fewer steps on slow machines, so that a recipe takes about as long everywhere."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from cook.base.errors import UserError
from cook.base.files import sha256, write_json
from cook.config.load import load_config
from cook.config.types import RunConfig
from cook.families.registry import by_config
from cook.pruning.family import ModelSource
from cook.recipe.summary import sample_batches
from cook.report.human import human_count, human_duration
from cook.training.settings import resolve_precision

OVERHEAD = 1.25
"""Time of a training step over its forward and backward pass: optimizer, gates, data, evaluation, saves."""
PROBE_STEPS = 3


def fitted_recipe(config: str, *, minutes: float) -> str:
    """The recipe to run so that all stages together take about `minutes` on this machine.

    The speed is measured once, with a few steps of the dense model. Where the recipe would take longer, a copy of it
    with proportionally fewer steps in each stage is written below its output folder. Later calls return that copy, so
    that an interrupted run resumes with the same steps.

    Args:
        config: Path of a `bmcook.json` that trains from fresh weights.
        minutes: Wanted duration of training.

    Returns:
        Path of the recipe: `config` itself where the machine is fast enough.

    Raises:
        UserError: the recipe starts from a model on disk.
    """
    settings = load_config(config, [])
    if settings.model.config is None:
        raise UserError(f"{config}: only recipes that train from fresh weights can be fitted", got="model.path")
    folder = Path(settings.output_dir) / "recipe"
    note, source = folder / "sizing.json", [sha256(settings.source.bmcook), minutes]
    if note.is_file():
        found = json.loads(note.read_text())
        if found["source"] == source:
            return str(found["recipe"])
    rate = tokens_per_second(settings)
    steps = sum(entry.training.get("steps", settings.training.steps) for entry in settings.stages)
    tokens = steps * settings.training.train_batch_size * settings.data.max_length
    seconds = OVERHEAD * tokens / rate
    share = min(1.0, 60 * minutes / seconds)
    print(
        f"this machine trains about {human_count(rate)} tokens/s: the recipe takes about {human_duration(seconds)}"
        + (f", so each stage gets {share:.0%} of its steps" if share < 1 else ""),
        file=sys.stderr,
    )
    folder.mkdir(parents=True, exist_ok=True)
    recipe = config if share == 1 else str(_with_fewer_steps(settings, folder, share))
    write_json(note, {"source": source, "recipe": recipe, "tokens_per_second": rate, "share_of_steps": share})
    return recipe


def tokens_per_second(settings: RunConfig) -> float:
    """Tokens per second of the dense model's forward and backward pass on this machine, in the run's precision."""
    assert settings.model.config is not None
    adapter = by_config(settings.model.config)
    native, _ = adapter.read(settings.model.config, {})
    source = ModelSource(adapter=adapter, config=native, tensors={}, path=Path("a fresh model"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    model = adapter.build(native).to(device, dtype[resolve_precision(settings.training, settings.deepspeed)])
    batches, _ = sample_batches(None, source)
    batch = {key: value.to(device) for key, value in batches[0].items() if key != "targets"}
    tokens = next(iter(batch.values())).numel()
    started = 0.0
    for step in range(PROBE_STEPS + 1):
        if step == 1:  # the first one allocates memory
            started = time.perf_counter()
        model(**batch).logits.float().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return PROBE_STEPS * tokens / (time.perf_counter() - started)


def _with_fewer_steps(settings: RunConfig, folder: Path, share: float) -> Path:
    """Copies the recipe's two files into `folder`, with this share of the steps of each stage."""
    recipe = json.loads(Path(settings.source.bmcook).read_text(encoding="utf-8"))
    for training in (recipe["training"], *(stage.get("training", {}) for stage in recipe["stages"])):
        if "steps" in training:
            training["steps"] = max(10, round(share * training["steps"]))
    scheme = settings.source.l0_pruning
    if scheme is not None:
        recipe["pruning"]["l0_pruning"] = "l0_pruning.json"
        write_json(folder / "l0_pruning.json", json.loads(Path(scheme).read_text(encoding="utf-8")))
    write_json(folder / "bmcook.json", recipe)
    return folder / "bmcook.json"
