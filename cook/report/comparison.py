"""The table and the figure that compare several evaluated models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cook.report import drawing
from cook.report.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILION
from cook.report.tables import MISSING, human_bytes, human_count, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
"""The measurements of one model, and its `name`."""


class _Metric(NamedTuple):
    key: str
    """The record's field."""
    title: str
    text: Callable[[float], str]
    colour: str
    better: str
    """The better direction, for the figure."""
    ratio: bool = True
    """Whether to show the ratio to the first model."""


PERPLEXITY = _Metric("perplexity", "perplexity", "{:.2f}".format, BLUE, "lower", ratio=False)
BITS = _Metric("bits_per_byte", "bits per byte", "{:.3f}".format, BLUE, "lower", ratio=False)
OTHERS = (
    _Metric("parameters", "parameters", human_count, ORANGE, "fewer"),
    _Metric("prefill_tokens_per_second", "prefill tokens/s", human_count, GREEN, "higher"),
    _Metric("decode_tokens_per_second", "decode tokens/s", human_count, PURPLE, "higher"),
    _Metric("peak_memory_bytes", "peak memory", human_bytes, VERMILION, "lower"),
)


def _metrics(records: Sequence[Record], same_tokens: bool) -> list[_Metric]:
    # Perplexities of different tokenizers have different units. Only bits per byte can be compared.
    metrics = [PERPLEXITY if same_tokens else BITS, *OTHERS]
    return [metric for metric in metrics if any(record.get(metric.key) is not None for record in records)]


def comparison_table(records: Sequence[Record], *, same_tokens: bool) -> str:
    """Formats the models as rows of a Markdown table, with the ratio to the first model in brackets.

    Args:
        records: One record per model, the reference model first.
        same_tokens: Whether all models use the same tokens, so that losses and perplexities can be compared.
    """
    metrics = _metrics(records, same_tokens)
    lead = ["model", "loss"] if same_tokens else ["model"]
    rows = []
    for record in records:
        loss = [MISSING if record["loss"] is None else f"{record['loss']:.4f}"] if same_tokens else []
        rows.append([record["name"], *loss, *(_cell(metric, record, records[0]) for metric in metrics)])
    return markdown_table([*lead, *(metric.title for metric in metrics)], rows)


def _cell(metric: _Metric, record: Record, first: Record) -> str:
    value, base = record.get(metric.key), first.get(metric.key)
    if value is None:
        return MISSING
    text = metric.text(value)
    return f"{text} ({value / base:.2f}×)" if metric.ratio and base and record is not first else text


def plot_comparison(records: Sequence[Record], path: str | Path, *, same_tokens: bool, title: str) -> Path:
    """Draws the models of `comparison_table` as rows of bars, with one column per metric.

    A line marks the value of the first model. Returns the path.
    """
    metrics = _metrics(records, same_tokens)
    label = max(len(str(record["name"])) for record in records)
    figure = drawing.new_figure(1 + 0.08 * label + 2.5 * len(metrics), 1.6 + 0.42 * len(records))
    columns = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(columns, metrics, strict=True):
        _draw_bars(axes, metric, records)
    columns[0].set_yticks(range(len(records)), [str(record["name"]) for record in records])
    columns[0].set_ylim(len(records) - 0.5, -0.5)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return drawing.save(figure, path)


def _draw_bars(axes: Axes, metric: _Metric, records: Sequence[Record]) -> None:
    values = [record.get(metric.key) for record in records]
    known = [value for value in values if value is not None]
    # Perplexities span orders of magnitude. One model with a very bad value must not make the other bars invisible.
    steep = not metric.ratio and min(known) > 0 and max(known) > 20 * min(known)
    if steep:
        axes.set_xscale("log")
        axes.set_xlim(min(known) / 2, max(known) * 30)
    else:
        axes.set_xlim(0, 1.55 * max(known) or 1)
    for row, (value, record) in enumerate(zip(values, records, strict=True)):
        if value is not None:
            axes.barh(row, value, height=0.62, color=metric.colour, alpha=1.0 if row else 0.55)
        text = _cell(metric, record, records[0])
        place = value if value is not None else axes.get_xlim()[0]
        look: dict[str, Any] = {"va": "center", "fontsize": 8.5, "color": INK}
        look["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.annotate(text, (place, row), (4, 0), textcoords="offset points", **look)
    if values[0] is not None:
        axes.axvline(values[0], color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    scale = ", log scale" if steep else ""
    axes.set_title(f"{metric.title} ({metric.better} is better{scale})", fontsize=9)
    axes.tick_params(axis="x", labelbottom=False, length=0, which="both")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
