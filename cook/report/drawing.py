"""Helpers for figures: colours, smoothing, label placement, and saving."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cook.base.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which is safe for all kinds of colour blindness.
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
GREY, PALE, INK = "#8C8C8C", "#EDF1F5", "#222222"

DPI = 100


def new_figure(width: float, height: float) -> Figure:
    """Creates an empty figure of `width` by `height` inches without pyplot."""
    # Importing matplotlib takes most of a second, so only a run that draws imports it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Writes the figure atomically, in the format of the file's suffix."""
    path = Path(path)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix(".") or "png", dpi=DPI)
    write_atomically(path, image.getvalue())
    return path


def message_figure(text: str, path: str | Path) -> Path:
    """Writes a figure that contains only `text`."""
    figure = new_figure(8, 2.5)
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=12, color=INK)
    return save(figure, path)


def tidy(axes: Axes) -> None:
    """Adds a light grid and removes the frame."""
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def smooth(values: Sequence[float]) -> list[float]:
    """Returns the mean over a centred window of a thirtieth of the values, or more for a short series."""
    sums = [0.0, *itertools.accumulate(values)]
    count = len(values)
    reach = max(count // 60, min(5, count // 8))
    windows = [(max(0, index - reach), min(count, index + reach + 1)) for index in range(count)]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in windows]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Returns positions at least `gap` apart within [low, high], each close to its `wanted` position (ascending).

    If they do not fit, they are spaced evenly and closer than `gap`.
    """
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    places: list[float] = []
    for wish in wanted:
        places.append(max(wish, places[-1] + gap if places else low))
    limit = high  # the last positions may be above the range: move them back
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places


def numbers_of(records: Sequence[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Returns the x and y values of the records that have both."""
    pairs = [(r[x], r[y]) for r in records if r.get(x) is not None and r.get(y) is not None]
    return [float(pair[0]) for pair in pairs], [float(pair[1]) for pair in pairs]
