"""`cook eval` and `cook compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cook.commands.options import options_of
from cook.evaluation.settings import Settings, checked

Data = Annotated[list[str], typer.Option(help="A UTF-8 text file to score; may be repeated.")]


@options_of(Settings)
def evaluate(
    model: Annotated[str, typer.Option(help="A Hugging Face model folder, with its tokenizer.")],
    data: Data,
    settings: Settings,
    coarse_mask: Annotated[str | None, typer.Option(help="Layer mask (`.pt`) to apply while evaluating.")] = None,
    heads_mask: Annotated[str | None, typer.Option(help="Head mask (`.pt`).")] = None,
    dimff_mask: Annotated[str | None, typer.Option(help="FFN mask (`.pt`).")] = None,
) -> None:
    """Print loss, perplexity, speed, memory and size of a model as one JSON object."""
    settings = checked(settings)
    from cook.evaluation.loading import Entry
    from cook.evaluation.measure import measure_loss, measure_speed, read_texts

    text = read_texts(data)
    entry = Entry(name=model, folder=model, coarse=coarse_mask, heads=heads_mask, dimff=dimff_mask)
    loaded, record = measure_loss(entry, text, settings)
    if settings.speed:
        record |= measure_speed([loaded], text, settings)[0]
    print(json.dumps(record))


@options_of(Settings)
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]DIR[,coarse=FILE][,heads=FILE][,dimff=FILE]...",
            help="Model folders; one with mask files is measured under these masks.",
        ),
    ],
    data: Data,
    settings: Settings,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for comparison.json and comparison.png.")] = Path(
        "results/comparison"
    ),
) -> None:
    """Compare several models on one text: a table, JSON and a figure. Ratios are to the first model."""
    settings = checked(settings)
    from cook.evaluation.loading import parse_entry
    from cook.evaluation.measure import compare, read_texts, write_comparison

    comparison = compare([parse_entry(model) for model in models], read_texts(data), settings, files=data)
    write_comparison(comparison, output)
