"""Figures of a run over time: the losses of all stages, and sparsity and λ of the mask stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cook.report import drawing
from cook.report.drawing import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, VERMILION
from cook.report.events import by_part
from cook.report.tables import human_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Smallest width of a stage, as a share of the figure.
MIN_STAGE_SHARE = 0.04

StageLogs = Sequence[tuple[str, list[dict[str, Any]]]]


@dataclass(frozen=True, kw_only=True)
class _Span:
    """The interval of a stage on the axis of tokens."""

    name: str
    start: float
    end: float
    records: list[dict[str, Any]]

    @classmethod
    def at(cls, start: float, name: str, records: list[dict[str, Any]]) -> _Span:
        tokens, _ = drawing.numbers_of(records, "tokens", "tokens")
        return cls(name=name, start=start, end=start + max(tokens, default=0.0), records=records)

    def losses(self) -> tuple[list[float], list[float]]:
        tokens, losses = drawing.numbers_of(self.records, "tokens", "loss")
        return [self.start + count for count in tokens], losses

    def held_out(self) -> tuple[list[float], list[float]]:
        steps, losses = drawing.numbers_of(self.records, "step", "held_out_loss")
        # An evaluation has no token count, so it is drawn at the token count of its training step.
        done = sorted(zip(*drawing.numbers_of(self.records, "step", "tokens"), strict=True))
        return [self.start + max((t for s, t in done if s <= step), default=0.0) for step in steps], losses


def plot_losses(stages: StageLogs, path: str | Path, baseline: StageLogs = ()) -> Path:
    """Draws the training loss of all stages, and the held-out losses, over cumulative tokens.

    Args:
        stages: The name and log of each stage, in the order in which they ran. `tokens` counts from the stage's start.
        path: The image file, which is also returned.
        baseline: The logs of a randomly masked model. A stage starts at the same place as the stage of the same name in
            `stages`. Any other stage follows the previous one of the baseline, and the first one follows the first of
            `stages`.
    """
    spans = _placed(stages)
    if not any(span.losses()[0] or span.held_out()[0] for span in spans):
        return drawing.message_figure("Losses: no stage has logged a loss yet", path)
    figure = drawing.new_figure(11, 5.6)
    axes = figure.add_subplot()
    drawing.tidy(axes)
    for span in spans:
        _draw_loss(axes, span, BLUE, "-", "")
    others = _placed(baseline, spans[0].end, {span.name: span.start for span in spans})
    for span in others:
        _draw_loss(axes, span, VERMILION, "--", "random masks: ")
    end = max(span.end for span in (*spans, *others)) or 1.0
    _scale_tokens(axes, spans, end)
    _limit_losses(axes, spans, others)
    _mark_stages(axes, spans)
    axes.set_ylabel("loss (nats per token)")
    figure.suptitle("Loss over all stages", x=0.01, ha="left", fontweight="bold")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return drawing.save(figure, path)


def _placed(logs: StageLogs, first: float = 0.0, starts: Mapping[str, float] | None = None) -> list[_Span]:
    """Places each stage at its start, or else after the previous one; `first` is where the first stage begins."""
    placed: list[_Span] = []
    for name, records in logs:
        after = placed[-1].end if placed else first
        placed.append(_Span.at((starts or {}).get(name, after), name, records))
    return placed


def _draw_loss(axes: Axes, span: _Span, colour: str, style: str, who: str) -> None:
    tokens, losses = span.losses()
    if tokens:
        axes.plot(tokens, losses, color=colour, alpha=0.25, linewidth=0.7, zorder=2)
        (line,) = axes.plot(tokens, drawing.smooth(losses), color=colour, linestyle=style, linewidth=1.8, zorder=3)
        line.set_label(f"{who}training loss, smoothed")
        if len(tokens) == 1:
            line.set(marker="o", clip_on=False)
    tokens, losses = span.held_out()
    if tokens:
        (points,) = axes.plot(tokens, losses, "s" if who else "D", color=colour, markersize=7, zorder=4)
        points.set(markeredgecolor="white", clip_on=False)
        points.set_label(f"{who}held-out loss" + ("" if who else " (the number beside a stage's name)"))


def _limit_losses(axes: Axes, spans: Sequence[_Span], others: Sequence[_Span]) -> None:
    # The loss of a random model falls quickly and would squeeze the rest of the curve, so it may exceed the axes.
    first = spans[0]
    tokens, losses = first.losses()
    if len(losses) < 20:
        return
    settled = first.start + 0.15 * (first.end - first.start)
    later = [loss for count, loss in zip(tokens, drawing.smooth(losses), strict=True) if count > settled]
    for span in (*spans[1:], *others):
        later += span.losses()[1] + span.held_out()[1]
    low, high = min(losses + later), max(later)
    if losses[0] > high + 0.25 * (high - low):
        axes.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        text, at = f"↑ from {losses[0]:.2f}", ("axes fraction", "offset points")
        axes.annotate(text, (0, 1), (5, -5), *at, va="top", fontsize=9, bbox=box)


def _scale_tokens(axes: Axes, spans: Sequence[_Span], end: float) -> None:
    """Makes the axis linear in tokens. If a stage would be too narrow, the axis is linear only within each stage."""
    import numpy as np

    edges = [0.0] + [span.end for span in spans if span.end > span.start]
    edges += [end] if end > edges[-1] else []
    shares = np.diff(edges) / end
    axes.set_xlabel("tokens since the start of the first stage")
    if 0 < len(shares) <= 15 and shares.min() < MIN_STAGE_SHARE:
        widened = np.maximum(shares, MIN_STAGE_SHARE)
        shown = np.concatenate([[0.0], np.cumsum(widened / widened.sum())])
        forward, backward = (lambda x: np.interp(x, edges, shown)), (lambda x: np.interp(x, shown, edges))
        axes.set_xscale("function", functions=(forward, backward))
        unit, name = next(((10.0**p, n) for p, n in ((9, "B"), (6, "M"), (3, "k")) if end >= 10**p), (1.0, ""))
        labels = [f"{edge / unit:.3g}{name if edge else ''}" for edge in edges]
        axes.set_xticks(edges, labels, rotation=35, ha="right", fontsize=9)
        axes.set_xlabel("tokens since the start of the first stage (linear within a stage; short stages are widened)")
    else:
        axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
    axes.set_xlim(0, end)


def _mark_stages(axes: Axes, spans: Sequence[_Span]) -> None:
    """Shades every second stage and writes the slanted names above, without overlap."""
    shown = axes.transLimits.transform
    scale = axes.xaxis.get_transform().transform
    edges = [[float(shown((float(scale(x)), 0))[0]) for x in (span.start, span.end)] for span in spans]
    middles = [sum(pair) / 2 for pair in edges]
    places = drawing.spread(middles, 0.034, 0.0, 0.97)
    for index, (span, middle, place) in enumerate(zip(spans, middles, places, strict=True)):
        if index % 2 == 0:
            axes.axvspan(span.start, span.end, color=PALE, zorder=0)
        if index:
            axes.axvline(span.start, color=GREY, linewidth=0.7, zorder=1)
        ends, where = ([middle, place], [1.0, 1.035]), axes.transAxes
        axes.plot(*ends, color=GREY, linewidth=0.7, clip_on=False, transform=where)
        held_out = span.held_out()[1]
        label = span.name + (f"  {held_out[-1]:.3f}" if held_out else "")
        axes.text(place, 1.04, label, rotation=35, ha="left", va="bottom", fontsize=9, color=INK, transform=where)


def plot_sparsity(stage_logs: StageLogs, path: str | Path) -> Path:
    """Draws expected and target sparsity (above) and λ (below) over the steps, with one column per mask stage.

    Each constraint is a thin line, their mean is bold, and the target is dashed. Stages without masks are left out.
    Returns the path.
    """
    columns = [(name, [r for r in records if r.get("expected_sparsity")]) for name, records in stage_logs]
    columns = [(name, _thinned(records)) for name, records in columns if records]
    if not columns:
        return drawing.message_figure("Sparsity: no stage has learned masks yet", path)
    figure = drawing.new_figure(max(6.0, 4.2 * len(columns)), 6.4)
    grid = figure.subplots(2, len(columns), squeeze=False, sharex="col", height_ratios=(3, 2))
    for (above, below), (name, records) in zip(grid.T, columns, strict=True):
        count = len(records[-1]["expected_sparsity"])
        _draw_constraints(above, records, "expected_sparsity", {"expected": BLUE}, "-")
        _draw_constraints(above, records, "target_sparsity", {"target": VERMILION}, "--")
        _draw_constraints(below, records, "lambda", {"lambda": GREEN, "lambda1": GREEN, "lambda2": PURPLE}, "-")
        above.set_title(f"{name}: {count} constraint{'s' if count != 1 else ''}", fontsize=11)
        above.set_ylim(-0.02, 1.02)
        below.axhline(0, color=GREY, linewidth=0.7)
        _spread(below, records)
        below.set_xlabel("step of the stage")
        for axes in (above, below):
            drawing.tidy(axes)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=9, framealpha=0.9)
    grid[0, 0].set_ylabel("sparsity (share removed)")
    grid[1, 0].set_ylabel("λ")
    figure.suptitle("Expected against target sparsity, and the multipliers", x=0.01, ha="left", fontweight="bold")
    return drawing.save(figure, path)


def _spread(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    # While a target rises faster than the gates can follow, λ exceeds its usual size by orders of magnitude.
    parts = [by_part(record.get("lambda") or {}, "lambda") for record in records]
    values = [v for part in parts for numbers in part.values() for v in numbers.values() if v]
    sizes = sorted(map(abs, values))
    if sizes and sizes[-1] > 20 * sizes[len(sizes) // 2]:
        axes.set_yscale("symlog", linthresh=sizes[len(sizes) // 2])
        axes.set_ylim(bottom=0 if min(values) > 0 else None)


def _thinned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # More points than pixels only make drawing slower. The last point is always kept.
    stride = max(1, len(records) // 1000)
    return records[::-stride][::-1]


_PART_NAMES = {"lambda": "λ", "lambda1": "λ1", "lambda2": "λ2"}


def _draw_constraints(
    axes: Axes, records: Sequence[dict[str, Any]], field: str, colours: Mapping[str, str], style: str
) -> None:
    default = next(iter(colours))
    parts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        for part, numbers in by_part(record.get(field) or {}, default).items():
            for constraint, value in numbers.items():
                parts.setdefault(part, {}).setdefault(constraint, []).append((record["step"], value))
    for part, lines in parts.items():
        colour, thin = colours.get(part, ORANGE), 0.35 if len(lines) <= 8 else 0.15
        by_step: dict[float, list[float]] = {}
        for points in lines.values():
            for step, value in points:
                by_step.setdefault(step, []).append(value)
            if len(lines) > 1 and style == "-":
                axes.plot(*zip(*points, strict=True), color=colour, alpha=thin, linewidth=0.7)
        means = [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]
        label = _PART_NAMES.get(part, part) + (", mean" if len(lines) > 1 else "")
        marker = "." if len(means) == 1 else None
        axes.plot(*zip(*means, strict=True), color=colour, linestyle=style, linewidth=2.0, marker=marker, label=label)
