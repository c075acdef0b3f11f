"""`cook eval` and `cook compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cook.commands.options import options_of
from cook.evaluation.settings import ProfileSettings, Settings, checked

Data = Annotated[list[str], typer.Option(help="A UTF-8 text file to score; may be repeated.")]


@options_of(Settings)
def evaluate(
    model: Annotated[str, typer.Option(help="A Hugging Face model folder, with its tokenizer.")],
    data: Data,
    settings: Settings,
    coarse_mask: Annotated[str | None, typer.Option(help="Layer mask (`.pt`) to apply while evaluating.")] = None,
    heads_mask: Annotated[str | None, typer.Option(help="Head mask (`.pt`).")] = None,
    dimff_mask: Annotated[str | None, typer.Option(help="FFN mask (`.pt`).")] = None,
    head_dims_mask: Annotated[str | None, typer.Option(help="Mask of the head dims (`.pt`).")] = None,
    experts_mask: Annotated[str | None, typer.Option(help="Mask of the experts (`.pt`).")] = None,
    hidden_mask: Annotated[str | None, typer.Option(help="Mask of the hidden dims (`.pt`).")] = None,
) -> None:
    """Print loss, perplexity, speed, memory and size of a model as one JSON object."""
    settings = checked(settings)
    from cook.evaluation.loading import Entry
    from cook.evaluation.measure import measure_loss, measure_speed, read_texts

    text = read_texts(data)
    masks = {"coarse": coarse_mask, "heads": heads_mask, "experts": experts_mask, "dimff": dimff_mask}
    masks |= {"head_dims": head_dims_mask, "hidden": hidden_mask}
    entry = Entry(name=model, folder=model, masks={kind: path for kind, path in masks.items() if path})
    loaded, record = measure_loss(entry, text, settings)
    if settings.speed and not loaded.streamed:
        record |= measure_speed([loaded], text, settings)[0]
    print(json.dumps(record))


@options_of(Settings)
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]DIR[,coarse=FILE][,heads=FILE][,experts=FILE][,dimff=FILE][,head_dims=FILE][,hidden=FILE]...",
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


@options_of(ProfileSettings)
def profile(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A model folder.")],
    settings: ProfileSettings,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the table, as JSON.")] = Path(
        "block_times.json"
    ),
) -> None:
    """Measure how long a model's blocks take at different sizes, for `joint.target_latency`.

    Run it on the machine that will run the pruned model, when nothing else runs there.
    """
    from cook.base.files import write_json
    from cook.evaluation.profile import measure_block_times, table
    from cook.families.source import open_model

    times = measure_block_times(open_model(model), settings, on_point=print)
    write_json(output, times.as_json())
    print(f"\n{table(times)}\nwritten: {output}")
