"""Comparison of several models on one text: scores, speeds, a table, JSON and a figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cook.base.errors import UserError
from cook.base.files import write_json
from cook.evaluation.loading import Entry, Loaded
from cook.evaluation.measure import measure_loss, measure_speed, text_ids
from cook.evaluation.settings import Settings
from cook.report.comparison import comparison_table, plot_comparison

RATIOS = ("parameters", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")


def compare(entries: Sequence[Entry], text: str, settings: Settings, *, files: Sequence[str]) -> dict[str, Any]:
    """Measures the models.

    With timing, all models are in memory together, so that they can take turns. Without timing, each model is freed
    before the next is loaded.

    Args:
        entries: The models; the first one is the reference.
        text: The text to score.
        settings: The settings of the measurement.
        files: The files that the text comes from, for the record.

    Returns:
        `{"data", "settings", "same_tokens", "models": [record of a model with its name and ratios to the first]}`.

    Raises:
        UserError: two models have the same name, or a model cannot be measured.
    """
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two models are called {twice[0]!r}", remedy="give each a name: NAME=DIR")
    records: list[dict[str, Any]] = []
    models: list[Loaded] = []
    first_ids, same_tokens = torch.empty(0), True
    for entry in entries:
        loaded, record = measure_loss(entry, text, settings)
        records.append({"name": entry.name} | record)
        ids = text_ids(loaded, text).cpu()
        first_ids = first_ids if len(records) > 1 else ids
        same_tokens = same_tokens and torch.equal(ids, first_ids)
        models += [loaded] if settings.speed else []
        del loaded
    if settings.speed:
        for record, speed in zip(records, measure_speed(models, text, settings), strict=True):
            record.update(speed)
    for record in records:
        record["ratio_to_first"] = {
            key: record[key] / records[0][key] for key in RATIOS if record.get(key) and records[0].get(key)
        }
    return {
        "data": list(files),
        "settings": dataclasses.asdict(settings),
        "same_tokens": same_tokens,
        "models": records,
    }


def write_comparison(comparison: dict[str, Any], folder: Path) -> None:
    """Prints the table; writes `comparison.json` and `comparison.png` into `folder`."""
    records, same_tokens = comparison["models"], comparison["same_tokens"]
    first = records[0]
    settings = comparison["settings"]
    steps = f", stride {settings['stride']}" if settings["stride"] else ""
    title = f"{', '.join(Path(file).name for file in comparison['data'])}: {first['method']}, {settings['window']} "
    title += f"tokens{steps}"
    print(comparison_table(records, same_tokens=same_tokens))
    if not same_tokens:
        print("The models' tokenizers differ, so their losses and perplexities per token cannot be compared.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", comparison)
    plot_comparison(records, folder / "comparison.png", same_tokens=same_tokens, title=title)
    print(f"written: {folder}/comparison.json, {folder}/comparison.png")
