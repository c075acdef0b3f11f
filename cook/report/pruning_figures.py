"""Figures of pattern pruning: a task's metric against sparsity, and the sparsity of each matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cook.report import drawing

Curve = Sequence[tuple[float, float]]
"""Points (sparsity in percent, metric)."""

COLOURS = (
    drawing.BLUE,
    drawing.VERMILION,
    drawing.GREEN,
    drawing.ORANGE,
    drawing.PURPLE,
    drawing.INK,
    drawing.GREY,
)
MARKERS = "osD^vPX"


def plot_metric_curves(
    curves: Mapping[str, Curve], path: str | Path, *, metric: str, title: str, dense: float | None = None
) -> Path:
    """Draws a metric against sparsity, with one line per curve and a dashed line for the dense model.

    Args:
        curves: Points (sparsity in percent, metric) by name.
        path: The PNG file to write.
        metric: Label of the vertical axis.
        title: Title of the figure.
        dense: The metric of the dense model, if known.
    """
    figure = drawing.new_figure(8.0, 4.8)
    axes = figure.subplots()
    if dense is not None:
        axes.axhline(dense, color=drawing.GREY, linestyle="--", linewidth=1.2, label=f"dense ({dense:.1f})")
    for number, (name, points) in enumerate(curves.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(*zip(*sorted(points), strict=True), color=colour, marker=marker, markersize=5, label=name)
    axes.set_xlabel("sparsity of the pruned matrices (%)")
    axes.set_ylabel(metric)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    drawing.tidy(axes)
    axes.legend(fontsize=9, framealpha=0.9)
    return drawing.save(figure, path)


def plot_sparsity_by_matrix(sparsity: Mapping[tuple[int, str], float], path: str | Path, *, title: str) -> Path:
    """Draws the sparsity of every matrix as a table of layers and roles.

    Args:
        sparsity: Sparsity from 0 to 1, by layer and role.
        path: The PNG file to write.
        title: Title of the figure.
    """
    layers = sorted({layer for layer, _ in sparsity})
    roles = list(dict.fromkeys(role for _, role in sparsity))
    values = [[sparsity.get((layer, role), float("nan")) for role in roles] for layer in layers]
    figure = drawing.new_figure(1.6 + 1.15 * len(roles), 1.6 + 0.42 * len(layers))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis_r", vmin=0.0, vmax=1.0, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:
                colour = "white" if value > 0.55 else drawing.INK
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(roles)), [role.replace("_", "\n") for role in roles], fontsize=9)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=9)
    axes.set_ylabel("layer")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="pruned share", fraction=0.05)
    return drawing.save(figure, path)
