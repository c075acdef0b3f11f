"""`python -m cook.evaluation --model DIR --data FILE`: loss, perplexity, speed, memory and size as one JSON object.

`python -m cook.evaluation compare DIR DIR --data FILE` sets several models side by side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cook.base.errors import run_entry
from cook.evaluation.compare import compare, write_comparison
from cook.evaluation.loading import Entry, parse_entry
from cook.evaluation.measure import measure_loss, measure_speed
from cook.evaluation.options import compare_parser, evaluate_parser, read_texts, settings_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures, prints."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        main_compare(arguments[1:])
        return
    options = evaluate_parser().parse_args(arguments)
    settings, text = settings_of(options), read_texts(options.data)
    masks = dict(coarse=options.coarse_mask, heads=options.heads_mask, dimff=options.dimff_mask)
    loaded, record = measure_loss(Entry(name=options.model, folder=options.model, **masks), text, settings)
    if settings.speed:
        record |= measure_speed([loaded], text, settings)[0]
    json.dump(record, sys.stdout)
    print()


def main_compare(arguments: Sequence[str]) -> None:
    """Several models."""
    options = compare_parser().parse_args(arguments)
    settings, text = settings_of(options), read_texts(options.data)
    comparison = compare([parse_entry(model) for model in options.models], text, settings, files=options.data)
    write_comparison(comparison, Path(options.output))


if __name__ == "__main__":
    run_entry(main)
